"""launch/bench.py on tiny models: all have the same task, what fails is recorded, what is written is whole."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from conf.schema import ConfigError, FullCacheTier, RunConfig
from launch import bench
from launch.assembly.prepare import prepare
from launch.benchmark.config import GridConfig, PeerSettings, contender_config, read_bench_config
from launch.benchmark.contender import Cell, Turn
from launch.benchmark.our_engine import OurEngine
from launch.benchmark.shared_models import SharedModels
from launch.benchmark.side_by_side import SideBySide
from launch.benchmark.table import ContenderRow, Status, compare, first_difference, make_table, write_grid_csv
from launch.benchmark.transformers_peers import GeneratePeer
from launch.command_line.tables import write_json
from tests.support.tiny_models import random_prompt

PEERS_EVERYWHERE = ("transformers", "transformers_static", "assisted", "prompt_lookup")
LLAMA_CPP = ("llama_cpp", "llama_cpp_lookup")


@pytest.fixture
def settings(checkpoints, tmp_path, monkeypatch) -> list[str]:
    """Overrides for a bench of seconds, in fp32, greedy, on a text of the tiny tokenizer's words."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(" ".join(f"t{token}" for token in random_prompt(900)))
    return [
        f"model.target={checkpoints('llama', seed=1)}",
        f"model.drafter={checkpoints('llama', seed=2)}",
        "model.dtype=float32",
        "sampling.temperature=0",
        "prompt.path=words.txt",
        "generation.max_new_tokens=12",
        "repetitions=2",
        "grid.contexts=[300]",
        "cache.retrieval.budget=64",
        "cache.streaming.window=60",
        "placement.device=cpu",
        "output=out",
    ]


def run(settings: list[str], *more: str, code: int = 0) -> dict:
    assert bench.main([*settings, *more]) == code
    record = json.loads(Path("out/bench.json").read_text())
    lines = list(csv.DictReader(Path("out/bench.csv").read_text().splitlines()))
    assert len(lines) == sum(len(cell["rows"]) for cell in record["cells"])
    return record


def rows_of(record: dict, cell: int = 0) -> dict[str, dict]:
    return {row["contender"]: row for row in record["cells"][cell]["rows"]}


def test_two_contenders_write_the_same_and_all_of_it_is_recorded(settings, capsys):
    record = run(settings, "only=[autoregressive,triforce]", "placement.threads=1")
    (cell,) = record["cells"]
    rows = rows_of(record)
    assert list(rows) == ["autoregressive", "triforce"]
    assert (cell["context"], cell["tier"], cell["positions"]) == (300, "device", 512)
    assert cell["prompt_tokens"] == 300 - (1 + 3 * 12 + 11)
    for row in rows.values():
        tbt = row["tbt_ms"]
        assert row["status"] == Status.ok and len(tbt["samples"]) == 2
        assert tbt["min"] <= tbt["median"] <= tbt["max"]
        assert row["first_difference"] is None and row["compared"]
        assert 0 <= row["outside"]["roles"] <= row["outside"]["forwards_and_copies"] < 1
        assert 1 + 3 * 12 <= row["new_tokens"] <= 1 + 3 * 12 + 11
    assert rows["autoregressive"]["ratio"] == 1 and rows["triforce"]["speculation"]["verifications"] > 0
    assert {"torch", "transformers"} <= set(record["versions"])
    assert record["machine"]["cpu"] and record["machine"]["threads"] == 1
    assert record["config"]["grid"]["contexts"] == [300] and "prompt.path=words.txt" in record["argv"]
    out = capsys.readouterr().out
    assert "300 tokens, device" in out and "same" in out and "outside" in out


def test_peers_write_what_our_engine_writes(settings):
    names = [*PEERS_EVERYWHERE, "transformers_offloaded"]
    record = run(settings, f"only=[autoregressive,{','.join(names)}]")
    rows = rows_of(record)
    assert list(rows) == ["autoregressive", *PEERS_EVERYWHERE]  # what is offloaded has its place in the host's cells
    for name in PEERS_EVERYWHERE:
        assert rows[name]["status"] == Status.ok and rows[name]["first_difference"] is None, name
        assert rows[name]["new_tokens"] >= 1 + 3 * 12 and len(rows[name]["tbt_ms"]["samples"]) == 2


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_writes_what_our_engine_writes(settings, name):
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason="Requires: gguf, llama-cpp-python")
    rows = rows_of(run(settings, f"only=[autoregressive,{name}]"))
    assert rows[name]["status"] == Status.ok and rows[name]["first_difference"] is None


def test_positions_beyond_the_model_s_are_stretched_for_all(settings):
    record = run(settings, "grid.contexts=[700]", "only=[autoregressive,retrieval,transformers,prompt_lookup]")
    assert record["cells"][0]["positions"] == 1024
    rows = rows_of(record)
    assert [row["first_difference"] for row in rows.values()] == [None] * 4


def test_sampled_peers_run_and_are_not_compared(settings):
    record = run(settings, "sampling.temperature=0.8", "only=[autoregressive,streaming,transformers,assisted]")
    for row in rows_of(record).values():
        assert row["status"] == Status.ok and not row["compared"] and row["ratio"] is not None


def test_each_tier_and_link_is_a_cell_and_peers_run_on_the_device(settings):
    more = ["grid.tiers=[device,host]", "grid.links_gb_per_s=[null,0.5]", "only=[autoregressive,prompt_lookup]"]
    record = run(settings, *more, "cache.full.block_tokens=64")
    cells = [(cell["tier"], cell["link_gb_per_s"], len(cell["rows"])) for cell in record["cells"]]
    assert cells == [("device", None, 2), ("host", None, 1), ("host", 0.5, 1)]
    assert rows_of(record, 2)["autoregressive"]["streaming"]["bytes"] > 0


def test_a_contender_that_fails_is_recorded_and_the_others_go_on(settings, monkeypatch, capsys):
    def broken(self, count):
        raise RuntimeError("no more paper")

    monkeypatch.setattr(OurEngine, "begin_counting", broken)
    monkeypatch.setattr(GeneratePeer, "decode", broken)
    record = run(settings, "only=[autoregressive,transformers,prompt_lookup]", code=1)
    rows = rows_of(record)
    assert [row["status"] for row in rows.values()] == [Status.failed, Status.failed, Status.ok]
    assert rows["transformers"]["reason"] == "RuntimeError: no more paper"
    assert rows["prompt_lookup"]["ratio"] is None
    assert "transformers failed: RuntimeError" in capsys.readouterr().out
    assert Path("out/failures.log").read_text().count("Traceback") == 2


def test_a_context_that_cannot_be_is_recorded_and_the_others_go_on(settings):
    record = run(settings, "grid.contexts=[20,5000,300]", "only=[autoregressive]", code=1)
    assert "grid.contexts has 20; it must be above the 48 tokens" in record["cells"][0]["reason"]
    assert "the prompt has 900 tokens; of 5000 in all" in record["cells"][1]["reason"]
    assert rows_of(record, 2)["autoregressive"]["status"] == Status.ok


class StandIn:
    """Stands for our engine: brings tokens without computing them, and notes its turns."""

    def __init__(self, events: list[str], cell: Cell, config: RunConfig, num_bytes: int = 0):
        self.mode, self._events, self._num_bytes = str(config.decoding.mode), events, num_bytes

    def needed_bytes(self) -> int:
        return self._num_bytes

    def load(self) -> None:
        self._events.append(self.mode)

    def start(self) -> list[int]:
        return [7]

    def decode(self, count: int) -> Turn:
        self._events.append(f"{self.mode} decodes")
        num_turns = sum("decodes" in event for event in self._events)
        return Turn(tokens=[7] * count, num_timed=count, seconds=count * num_turns / 1000)

    def begin_counting(self) -> None: ...

    def facts(self) -> dict:
        return {}

    def close(self) -> None: ...


def run_stand_ins(settings: list[str], only: str, needs: dict[str, int], free: float = 1e9) -> tuple[dict, list[str]]:
    """The one cell's rows, and what happened in which order."""
    config, events = read_bench_config([*settings, only]), []
    Path("out").mkdir()
    SideBySide(
        config=config,
        folder=Path("out"),
        console=Console(),
        argv=[],
        make_ours=lambda cell, run: StandIn(events, cell, run, needs.get(str(run.decoding.mode), 0)),
        free_bytes=lambda device: free,
    ).run()
    return rows_of(json.loads(Path("out/bench.json").read_text())), events


def test_what_does_not_fit_is_skipped_and_what_fits_alone_runs_alone(settings):
    needs = {"autoregressive": 60, "streaming": 60, "retrieval": 101}
    rows, order = run_stand_ins(settings, "only=[autoregressive,streaming,retrieval]", needs, free=100 / 0.9 + 0.1)
    assert [row["status"] for row in rows.values()] == [Status.ok, Status.ok, Status.skipped]
    assert "GiB are free" in rows["retrieval"]["reason"]
    assert order == ["autoregressive", *["autoregressive decodes"] * 3, "streaming", *["streaming decodes"] * 3]


def test_turns_go_around_and_the_warm_up_is_not_counted(settings):
    rows, events = run_stand_ins(settings, "only=[autoregressive,streaming]", needs={})
    turns = [event.removesuffix(" decodes") for event in events if "decodes" in event]
    first, second = "autoregressive", "streaming"
    assert turns == [first, second, second, first, first, second]
    assert rows[first]["tbt_ms"]["samples"] == pytest.approx([4, 5])
    assert rows[second]["tbt_ms"]["samples"] == pytest.approx([3, 6])
    assert rows[second]["ratio"] == pytest.approx(1.0)


def test_an_interrupted_bench_keeps_the_cells_it_has(settings, monkeypatch):
    monkeypatch.setattr(SideBySide, "_measure", lambda self, group: (_ for _ in ()).throw(KeyboardInterrupt))
    assert bench.main([*settings, "only=[autoregressive]"]) == 130
    assert json.loads(Path("out/bench.json").read_text())["cells"][0]["context"] == 300


# ---- Configuration. ----


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grid.contexts=[]"], ["grid.contexts is []"]),
        (["grid.tiers=[tape]"], ["tape", "device"]),
        (["grid.links_gb_per_s=[-1]"], ["grid.links_gb_per_s", "above 0"]),
        (["repetitions=0"], ["repetitions is 0", ">= 1"]),
        (["peers=[vllm]"], ["peers is 'vllm'", "llama_cpp"]),
        (["only=[triforce,nobody]"], ["only is 'nobody'", "transformers"]),
        (["placement=pipeline"], ["placement.kind", "one process"]),
        (["generation.ignore_eos=false"], ["generation.ignore_eos", "true"]),
        (["generation.use_model_rules=true"], ["generation.use_model_rules", "false"]),
        (["generation.stop=[x]"], ["generation.stop", "empty"]),
        (["generation.max_new_tokens=11"], ["generation.max_new_tokens is 11", "above 11"]),
        (["peer.num_assistant_tokens=0"], ["peer.num_assistant_tokens is 0", ">= 1"]),
        (["peer.num_assistant_tokens_schedule=wild"], ["'wild'", "constant, heuristic"]),
        (["contenders.triforce=decoding.gamma3=1"], ["contenders.triforce", "decoding.gamma3", "gamma"]),
        (["contenders.triforce=decoding.gamma2=many"], ["contenders.triforce", "an integer"]),
        (["contenders.triforce=decoding.gamma2=1000"], ["contenders.triforce", "between 0 and 256"]),
        (["contenders.mine=sampling.temperature=0"], ["contenders.mine", "for all contenders"]),
        (["contenders.mine=prompt.path=a"], ["contenders.mine", "for all contenders"]),
        (["contenders.assisted="], ["contenders is 'assisted'", "no peer"]),
        (["contenders.mine='\"'"], ["contenders.mine", "quotation"]),
        (["nonsense=1"], ["nonsense"]),
        (["prompt.path=nowhere.txt"], ["prompt.path is 'nowhere.txt'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_bad_configuration_ends_with_code_2_and_one_message(tmp_path, monkeypatch, capsys, overrides, words):
    monkeypatch.chdir(tmp_path)
    assert bench.main(overrides) == 2
    message = capsys.readouterr().err
    assert message.startswith("tierforce: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


def test_contenders_are_overrides_of_the_run():
    config = read_bench_config(["contenders.mine=decoding.gamma2=16 cache.retrieval.budget=2048", "decoding.gamma1=4"])
    ours = config.runs_of_ours()
    assert (ours["mine"].decoding.gamma2, ours["mine"].cache.retrieval.budget) == (16, 2048)
    assert ours["mine"].decoding.gamma1 == ours["streaming"].decoding.gamma1 == 4
    assert {name: str(run.decoding.mode) for name, run in ours.items()} == {
        **{name: name for name in ("autoregressive", "streaming", "retrieval", "triforce")},
        "mine": "triforce",
    }
    assert config.decoding.gamma2 == 8  # the base is as it was


def test_a_contender_s_own_tier_goes_before_the_grid_s():
    base = read_bench_config([]).run_config
    assert contender_config("mine", "cache.full.tier=disk", base).cache.full.tier == "disk"
    with pytest.raises(ConfigError, match="for all contenders"):
        contender_config("mine", "placement.threads=3", base)


def test_cells_of_the_grid_have_links_where_they_stream():
    grid = GridConfig(contexts=[10, 20], tiers=[FullCacheTier.device, FullCacheTier.disk], links_gb_per_s=[None, 2.0])
    one = [("device", None), ("disk", None), ("disk", 2.0)]
    assert [(context, str(tier), link) for context, tier, link in grid.cells()] == [
        (context, *place) for context in (10, 20) for place in one
    ]


# ---- Numbers. ----


def row(name: str, *samples: float, tokens: list[int] | None = None, **more) -> ContenderRow:
    return ContenderRow(name=name, settings="", samples_ms=list(samples), token_ids=tokens or [1, 2, 3], **more)


def test_ratios_are_of_medians_and_differences_where_both_have_tokens():
    reference, other = row("autoregressive", 10, 30, 20), row("triforce", 5, 4, 100, tokens=[1, 2, 3, 4])
    wrong, failed = row("assisted", 20, tokens=[1, 9]), ContenderRow(name="x", settings="", status=Status.failed)
    compare([reference, other, wrong, failed], is_greedy=True)
    assert [entry.ratio for entry in (reference, other, wrong, failed)] == [1, 4, 1, None]
    assert [entry.first_difference for entry in (reference, other, wrong)] == [None, None, 1]
    assert not failed.is_compared
    compare([other], is_greedy=True)  # nothing to hold it against


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 3, 3]) == 1
    assert first_difference([], [1]) is None


def test_the_table_shows_medians_spread_and_tokens():
    levels = [{"name": "drafter", "acceptance_rate": 0.25}, {"name": "retrieval", "acceptance_rate": None}]
    facts = {
        "speculation": {"tokens_per_verification": 6.5, "levels": levels},
        "outside": {"roles": 0.01, "forwards_and_copies": 0.034},
    }
    rows = [row("autoregressive", 10, 30, 20), row("triforce", 5, 4, 6, facts=facts, ttft_s=2.0)]
    rows += [row("assisted", 5, tokens=[1, 9]), ContenderRow(name="llama_cpp", settings="", status=Status.skipped)]
    compare(rows, is_greedy=True)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(make_table("32,768 tokens, host", rows))
    lines = capture.get().splitlines()
    text = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert text["autoregressive"] == ["20.0", "10.0..30.0", "1.00"]
    assert text["triforce"] == ["5.0", "4.0..6.0", "4.00", "6.50", "25%", "/", "3.4%", "same", "2.0"]
    assert text["assisted"][-3:] == ["differ", "at", "1"]
    assert text["llama_cpp"] == ["skipped"]


def test_csv_and_json_hold_what_was_measured(tmp_path):
    facts = {"speculation": {"tokens_per_verification": 6.5, "levels": [{"name": "drafter", "acceptance_rate": 0.25}]}}
    rows = [row("autoregressive", 10, 30, 20), row("triforce", 5, 4, 6, facts=facts)]
    compare(rows, is_greedy=False)
    cell = {"context": 300, "prompt_tokens": 250, "tier": "host", "link_gb_per_s": 2.0, "positions": 512}
    cell["rows"] = [entry.to_plain() for entry in rows]
    write_grid_csv(tmp_path / "a.csv", [cell])
    write_json(tmp_path / "a.json", {"cells": [cell]})
    first, second = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert (first["contender"], first["tbt_ms"], first["tbt_ms_min"], first["tbt_ms_max"]) == (
        *("autoregressive", "20", "10", "30"),
    )
    assert (second["ratio"], second["draft_acceptance"], second["retrieval_acceptance"]) == ("4.0", "0.25", "")
    assert json.loads((tmp_path / "a.json").read_text())["cells"][0]["rows"][1]["tbt_ms"]["samples"] == [5, 4, 6]


def test_settings_of_the_assistant_are_its_own_configuration_s(settings, monkeypatch):
    config = read_bench_config([*settings, "peer.num_assistant_tokens=3", "peer.assistant_confidence_threshold=0"])
    assert config.peer == PeerSettings(num_assistant_tokens=3, assistant_confidence_threshold=0)
    prepared = prepare(config.run_config)
    cell = Cell(config=config.run_config, prepared=prepared, prompt=[1], num_new_tokens=4, seed=0)
    shared = SharedModels(cell, config.peer, Path())
    generation = shared.assistant.generation_config
    assert (generation.num_assistant_tokens, generation.num_assistant_tokens_schedule) == (3, "constant")
    assert generation.assistant_confidence_threshold == 0
