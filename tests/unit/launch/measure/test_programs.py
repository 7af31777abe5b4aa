"""Measuring programs are started like all others: help with their keys, and one line for a key that there is not."""

from __future__ import annotations

import importlib

import pytest

PROGRAMS = {
    "measure.acceptance": "documents:",
    "measure.collectives": "num_ranks:",
    "measure.gpu": "cells:",
    "measure.messages": "vocabularies:",
    "measure.stream": "block_mib:",
    "train_demo": "books:",
}
"""Program: one of its keys."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_the_keys(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"launch.{name}").main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert PROGRAMS[name] in out and "key=value" in out


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_key_is_refused_in_one_line(name, capsys):
    assert importlib.import_module(f"launch.{name}").main(["no_such_key=1"]) == 2
    error = capsys.readouterr().err
    assert "no_such_key" in error and error.count("\n") == 1


def test_help_of_the_pipeline_names_its_tables(capsys):
    assert importlib.import_module("launch.measure.pipeline").main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "verification" in out and "overlap" in out


def test_training_without_books_is_refused_in_one_line(tmp_path, capsys):
    program = importlib.import_module("launch.train_demo")
    assert program.main([]) == 2
    assert program.main([f"books={tmp_path}", f"work={tmp_path / 'work'}"]) == 2
    without, empty = capsys.readouterr().err.splitlines()
    assert "books is None; it must be a folder" in without
    assert f"books is '{tmp_path}'; it must be a folder with .txt files" in empty
