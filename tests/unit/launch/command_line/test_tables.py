"""Tables that measurements write, and files that are whole or not there."""

import json

import pytest

from launch.command_line.tables import markdown_table, shown, write_atomically, write_csv, write_json


def test_a_markdown_table_has_a_head_a_rule_and_a_line_for_each_row():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |\n"


def test_a_number_is_shown_in_its_form_and_what_is_missing_as_wished():
    assert (shown(0.5, ".0%"), shown(None, ".1f"), shown(None, ".1f", "-")) == ("50%", "", "-")


def test_a_csv_file_has_blanks_for_what_is_missing(tmp_path):
    write_csv(tmp_path / "table.csv", ["a", "b"], [{"a": 1, "b": None}, {"b": "x,y"}])
    assert (tmp_path / "table.csv").read_bytes() == b'a,b\r\n1,\r\n,"x,y"\r\n'


def test_a_csv_file_with_a_column_too_many_is_refused_and_the_earlier_one_stays(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, ["a"], [{"a": 1}])
    with pytest.raises(ValueError, match="b"):
        write_csv(path, ["a"], [{"a": 1, "b": 2}])
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_numbers_that_are_none(tmp_path):
    write_json(tmp_path / "record.json", {"seconds": [0.5, None]})
    assert json.loads((tmp_path / "record.json").read_text()) == {"seconds": [0.5, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "record.json", {"seconds": float("nan")})


def test_text_that_is_no_utf8_is_written_all_the_same(tmp_path):
    write_atomically(tmp_path / "text", "lone \udc80\n")
    assert (tmp_path / "text").read_bytes() == b"lone \\udc80\n"
