"""launch/run.py: bad input ends with code 2 and one message, a failure with 1 and one line, Ctrl-C with 130.

Most cases run in this process, with an engine that has no model; a few start the program as a user does.
"""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import PreTrainedTokenizerFast

from conf.schema import ConfigError
from launch import run
from launch.assembly.run_folder import claim
from launch.assembly.sizing import with_known_budget
from launch.command_line.overrides import CONFIG_FOLDER, read_config
from orchestrator import run_files
from orchestrator.round import Round
from orchestrator.session import Session
from orchestrator.text_stream import TextStream

PROGRAM = Path(run.__file__)
MAX_POSITIONS = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class FakeHierarchy:
    """Writes "abab..." two tokens a round; `before` is called with "start" or the round's number."""

    def __init__(self, session: Session, before):
        self.session, self._before, self._num_rounds = session, before, 0

    def start(self) -> Round:
        self._before("start")
        return Round(index=0, proposed=[], origins=[], num_accepted=0, tokens=self.session.commit([ord("a")]))

    def round(self) -> Round:
        self._num_rounds += 1
        self._before(self._num_rounds)
        tokens = self.session.commit([ord("b"), ord("a")])
        return Round(
            index=self._num_rounds,
            proposed=[ord("b"), ord("x")],
            origins=["drafter", "retrieval"],
            num_accepted=1,
            tokens=tokens,
            inner_steps=[(2, 1)],
            seconds={"verify": 1e-4},
        )


class FakeEngine:
    def __init__(self, session: Session, before):
        self.hierarchy, self.notes, self.is_closed = FakeHierarchy(session, before), ["device cpu"], False

    def on_prefill_progress(self, callback) -> None:
        callback(10, 20)

    def memory_report(self):
        return {"device": {"planned_bytes": 10, "peak_bytes": 9}}

    def streaming_report(self):
        return {"bytes": 0, "seconds": 0.0, "gb_per_s": 0.0, "stall_s": 0.0, "emulated_link_gb_per_s": None}

    def processes_report(self):
        return []

    def close(self) -> None:
        self.is_closed = True


OF_FILE = {"applied": {"repetition_penalty": 1.3}, "not_applied": {"top_k": 20}}
"""What is taken from generation_config.json."""


class FakeEngines(SimpleNamespace):
    """Stands for the modules launch.assembly.prepare and launch.assembly.engine."""

    def __init__(self):
        super().__init__(before=lambda point: None, engine=None, build_error=None)

    def prepare(self, config):
        rules = SimpleNamespace(report=lambda: OF_FILE)
        sizes = {"vocab_size": 256, "max_positions": MAX_POSITIONS, "eos_ids": frozenset()}
        return SimpleNamespace(tokenizer=byte_tokenizer(), rules=rules, vocabulary=None, notes=[], **sizes)

    def build(self, task):
        if self.build_error:
            raise self.build_error
        stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), task.config.generation.stop)
        session = Session(prompt=task.prompt_ids, max_new_tokens=task.max_new_tokens, text_stream=stream)
        self.engine = FakeEngine(session, self.before)
        return self.engine


@pytest.fixture
def engines(monkeypatch, tmp_path):
    fake = FakeEngines()
    for module in ("launch.assembly.prepare", "launch.assembly.engine"):
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.chdir(tmp_path)
    return fake


def result_of(folder: str = "o") -> dict:
    return json.loads(Path(folder, "result.json").read_text())


# (arguments, what the message must name: key, value, legal value)
REFUSED = [
    (["decoding.gama1=3"], ["decoding.gama1", "3", "decoding.gamma1", "for example 2"]),
    (["gamma1=3"], ["gamma1", "3", "decoding.gamma1", "for example 2"]),
    (["temprature=0"], ["temprature", "0", "sampling.temperature", "0.6"]),
    (["+decoding.speed=9"], ["decoding.speed", "9", "decoding."]),
    (["zzz=1"], ["zzz", "1", "decoding", "sampling"]),
    (["decoding.gamma1=four"], ["decoding.gamma1", "'four'", "an integer or auto, for example 2"]),
    (["decoding.gamma1=1.5"], ["decoding.gamma1", "'1.5'", "an integer"]),
    (["decoding.gamma1=true"], ["decoding.gamma1", "'true'", "an integer"]),
    (["decoding.gamma1=null"], ["decoding.gamma1", "'null'", "an integer"]),
    (["decoding.gamma1=1,2"], ["decoding.gamma1", "'1,2'", "an integer"]),
    (["decoding.gamma1=65"], ["decoding.gamma1", "65", "between 0 and 64"]),
    (["decoding.gamma1="], ["decoding.gamma1", "''", "an integer"]),
    (["decoding=fast"], ["decoding", "'fast'", "decoding.mode"]),
    (["decoding={gamma1: four}"], ["decoding.gamma1", "four", "an integer"]),
    (["~decoding.gamma1"], ["decoding.gamma1", "an integer"]),
    (["decoding.mode=fast"], ["decoding.mode", "'fast'", "triforce, retrieval, streaming, autoregressive"]),
    (["model=gpt5"], ["model", "'gpt5'", "demo", "llama2-7b-128k", "qwen3-8b"]),
    (["model=null"], ["model", "'null'", "demo"]),
    (["model=[demo]"], ["model", "'[demo]'", "demo"]),
    (["placement=moon"], ["placement", "'moon'", "auto, colocated, inline, pipeline"]),
    (["model.target=null"], ["model.target", "'null'", "a text"]),
    (["model.target="], ["model.target", "''", "hub id"]),
    (["cache.retrieval.budget=1001"], ["cache.retrieval.budget", "1001", "1000"]),
    (["cache.retrieval.rebuild=often"], ["cache.retrieval.rebuild", "often", "never, adaptive"]),
    (["cache.full.tier=moon"], ["cache.full.tier", "'moon'", "auto, device, host"]),
    (["sampling.temperature=-1"], ["sampling.temperature", "-1", "0 (greedy)"]),
    (["sampling.temperature=nan"], ["sampling.temperature", "nan", "0 (greedy)"]),
    (["sampling.temperature=inf"], ["sampling.temperature", "inf", "0 (greedy)"]),
    (["sampling.temperature=hot"], ["sampling.temperature", "'hot'", "a number, for example 0.6"]),
    (["sampling.top_p=0"], ["sampling.top_p", "0", "at most 1"]),
    (["sampling.top_k=1.5"], ["sampling.top_k", "'1.5'", "an integer"]),
    (["sampling.top_k=-2"], ["sampling.top_k", "-2", ">= 0"]),
    (["sampling.seed=-1"], ["sampling.seed", "-1", "null"]),
    (["sampling.coupling=loose"], ["sampling.coupling", "'loose'", "maximal, gumbel"]),
    (["sampling.block_verification=maybe"], ["sampling.block_verification", "'maybe'", "true or false"]),
    (["generation.stop=END"], ["generation.stop", "'END'", "a list of texts"]),
    (["generation.stop=a,b"], ["generation.stop", "'a,b'", "a list of texts"]),
    (["generation.stop=['']"], ["generation.stop", "['']", "non-empty"]),
    ([f"generation.stop={['x'] * 65}"], ["generation.stop", "65 strings", "at most 64"]),
    ([f"generation.stop={['x'] * 9000}"], ["generation.stop", "['x'", "at most 10000 characters"]),
    (["generation.max_new_tokens=0"], ["generation.max_new_tokens", "0", ">= 1"]),
    (["prompt.max_tokens=0"], ["prompt.max_tokens", "0", ">= 1"]),
    (["prompt.text="], ["prompt.text", "''", "at least one character"]),
    (["generation.stop=[[a,b]]"], ["generation.stop", "'[[a,b]]'", "a list of texts"]),
    (["generation.stop=[null]"], ["generation.stop", "'[null]'", "a list of texts"]),
    (["generation.stop=[:(]"], ["generation.stop", "'[:(]'", "a list of texts", "in quotes"]),
    (["generation.stop=['a,b]"], ["generation.stop", "['a,b]", "a list of texts", "in quotes"]),
    (["decoding.gamma1=~3"], ["decoding.gamma1", "'~3'", "an integer or auto, for example 2"]),
    (["model=~/llama"], ["model", "'~/llama'", "demo", "model.target="]),
    (["prompt.text=${nowhere}"], ["prompt.text", "${nowhere}", "a text", "\\${ is a literal ${"]),
    (["prompt.text=it costs ${5"], ["prompt.text", "'it costs ${5'", "a text", "\\${ is a literal ${"]),
    (["output=null"], ["output", "'null'", "a text"]),
    (["output=~nobody-here/runs"], ["output", "'~nobody-here/runs'", "no user 'nobody-here'", "./~nobody-here/runs"]),
    (["prompt.path=~nobody-here/b"], ["prompt.path", "'~nobody-here/b'", "no user", "./~nobody-here/b"]),
    (["tiers.disk.folder=~nobody-here"], ["tiers.disk.folder", "no user", "./~nobody-here"]),
    (["model.drafter=~/no/such/model"], ["model.drafter", "no/such/model", "local folder"]),
    (["prompt.path=2024.10"], ["prompt.path", "'2024.10'", "does not exist"]),
    (["model.target=./1e3"], ["model.target", "'./1e3'", "hub id"]),
    (["prompt.text=???"], ["prompt.text", "???", "a text"]),
    (["prompt.text=a\udcff"], ["prompt.text", "udcff", "UTF-8"]),
    (["prompt.text=a", "prompt.path=b"], ["prompt.text", "'a'", "prompt.path"]),
    (["prompt.path=nowhere.txt"], ["prompt.path", "'nowhere.txt'", "UTF-8 text file"]),
    (["prompt.path=."], ["prompt.path", "'.'", "folder", "UTF-8 text file"]),
    (["placement.device=tpu"], ["placement.device", "'tpu'", "cuda:N"]),
    (["output=file.txt/run"], ["output", "'file.txt/run'", "outputs/run"]),
    (["output=file.txt"], ["output", "'file.txt'", "outputs/run"]),
    (["output=" + "x" * 300], ["output", "xxx", "outputs/run"]),
    (["output="], ["output", "''", "outputs/run"]),
    (["output=dangling"], ["output", "'dangling'", "link to nowhere/at/all", "outputs/run"]),
    (["output=dangling/run"], ["output", "'dangling/run'", "link to nowhere/at/all", "outputs/run"]),
    (["output=circle"], ["output", "'circle'", "circle", "outputs/run"]),
    (["output=new/" + "x" * 300], ["output", "File name too long", "outputs/run"]),
    (["output=" + "x/" * 3000], ["output", "File name too long", "outputs/run"]),
    (["output=has_file"], ["output", "'has_file'", "has_file/.hydra", "outputs/run"]),
    (["output=has_folder", "prompt.text=x"], ["output", "'has_folder'", "Is a directory", "outputs/run"]),
    (["hydra.run.dir=dangling"], ["output", "dangling", "outputs/run"]),
    (["-m", "hydra.sweep.dir=dangling", "sampling.seed=1,2"], ["output", "dangling", "outputs/run"]),
    (["-m", "decoding.gama1=1,2"], ["gama1"]),
    (["hydra.speed=1"], ["hydra.speed=1"]),
    (["gamma"], ["'gamma'", "key=value", "decoding.gamma1=2"]),
    (["="], ["'='", "key=value", "decoding.gamma1=2"]),
    (["=3"], ["'=3'", "key=value", "decoding.gamma1=2"]),
    (["sampling.top_k=" + "(" * 100_000], ["sampling.top_k", "((((", "an integer"]),
    (["prompt.text=${no\nwhere}"], ["prompt.text", "no\\nwhere", "a text"]),
    (["cache.retrieval.budget=-8"], ["cache.retrieval.budget", "-8", ">= 0"]),
    (["cache.retrieval.chunk_size=7"], ["cache.retrieval.budget", "1024", "chunk_size=7", "1022"]),
    (["decoding.gamma1=-1"], ["decoding.gamma1", "-1", "between 0 and 64"]),
    (["decoding.gamma2=257"], ["decoding.gamma2", "257", "between 0 and 256"]),
    (["sampling.temperature=101"], ["sampling.temperature", "101", "between 0 (greedy) and 100"]),
    (["sampling.top_p=-0.1"], ["sampling.top_p", "-0.1", "above 0"]),
    (["sampling.top_p=1.1"], ["sampling.top_p", "1.1", "at most 1"]),
    (["sampling.seed=18446744073709551616"], ["sampling.seed", "18446744073709551616", "2**64 - 1"]),
    (["sampling.min_p=2"], ["sampling.min_p", "'2'", "sampling.top_p"]),
    (["generation.n=1000000"], ["generation.n", "1000000"]),
    (["sampling.logit_bias={5000:1}"], ["sampling.logit_bias", "5000", "keys begin with"]),
    (["generation.max_new_tokens=-1"], ["generation.max_new_tokens", "-1", ">= 1"]),
    (["cache.streaming.window=0"], ["cache.streaming.window", "0", ">= 1"]),
    (["cache.full.stream_buffers=1"], ["cache.full.stream_buffers", "1", "between 2 and 64"]),
    (["cache.full.device_layers=-1"], ["cache.full.device_layers", "'-1'", "auto"]),
    (["cache.full.device_layers=6", "cache.full.tier=device"], ["cache.full.device_layers", "'6'", "auto"]),
    (["tiers.disk.folder=/proc"], ["tiers.disk.folder", "'/proc'", "outputs/disk"]),
    (["tiers.disk.readers=65"], ["tiers.disk.readers", "'65'", "between 1 and 64"]),
    (["tiers.link.gb_per_s=nan"], ["tiers.link.gb_per_s", "nan", "above 0"]),
    (["placement.threads=0"], ["placement.threads", "'0'", "auto"]),
    (["placement.threads=1000000"], ["placement.threads", "'1000000'", "between 1 and 1024"]),
    (["sampling.coupling=gumbel", "sampling.block_verification=true"], ["sampling.block_verification", "false"]),
    (["model.max_positions=0"], ["model.max_positions", "0", ">= 1"]),
    (["model.dtype=float8"], ["model.dtype", "'float8'", "auto, float32, bfloat16, float16"]),
    (["model.target=/dev/null"], ["model.target", "'/dev/null'", "hub id"]),
    # These need the tokenizer and the model's configuration.
    (["prompt.max_tokens=65"], ["prompt.max_tokens", "65", "maximum context length is 64", "prompt.max_tokens=64"]),
    (["prompt.max_tokens=null"], ["at least 256 tokens", "maximum context length is 64", "prompt.max_tokens=64"]),
]


@pytest.mark.parametrize(("argv", "named"), REFUSED, ids=[" ".join(argv)[:40] for argv, _ in REFUSED])
def test_bad_input_gives_code_2_and_one_message(engines, capfd, argv, named):
    Path("file.txt").write_text("a file")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("circle").symlink_to("circle")
    Path("has_folder/result.json").mkdir(parents=True)
    Path("has_file").mkdir()
    Path("has_file/.hydra").touch()
    assert run.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("tierforce: ") and err.count("\n") == 1 and len(err) < 1000, err
    assert all(part in err for part in named), err
    assert "Traceback" not in err
    assert not [path for path in Path().rglob("result.json") if path.is_file()]


def test_a_refused_configuration_leaves_no_folder(engines):
    run.main(["decoding.gamma1=four", "output=o"])
    run.main(["prompt.path=nowhere.txt", "output=p/q"])
    assert not list(Path().iterdir())


# (input, what must be named)
STANDARD_INPUTS = [
    (b"", ["prompt.path is '-'", "standard input", "nothing more, to read", "book.txt"]),
    (b"caf\xe9", ["prompt.path is '-'", "not UTF-8 at byte 3"]),
    (None, ["prompt.path is '-'", "standard input", "nothing"]),
]


@contextmanager
def standard_input(content: bytes | None, path: Path):
    """Within it the process's standard input is a file with this content; None: it is closed."""
    path.write_bytes(content or b"")
    earlier = os.dup(0)
    try:
        with path.open("rb") as file:
            os.dup2(file.fileno(), 0)
        if content is None:
            os.close(0)
        yield
    finally:
        os.dup2(earlier, 0)
        os.close(earlier)


@pytest.mark.parametrize(("content", "named"), STANDARD_INPUTS, ids=["empty", "latin-1", "closed"])
def test_a_standard_input_that_is_no_text_is_refused(engines, capfd, tmp_path_factory, content, named):
    with standard_input(content, tmp_path_factory.mktemp("in") / "text"):
        assert run.main(["prompt.path=-", "output=o"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("tierforce: ") and err.count("\n") == 1 and all(part in err for part in named), err


def test_a_terminal_is_no_document(engines, capfd, tmp_path_factory):
    ours, theirs = os.openpty()
    earlier = os.dup(0)
    try:
        os.dup2(theirs, 0)
        assert run.main(["prompt.path=-"]) == 2
    finally:
        os.dup2(earlier, 0)
        for number in (ours, theirs, earlier):
            os.close(number)
    assert "the terminal; it must be a file or a pipe: < book.txt" in capfd.readouterr().err


def test_the_prompt_is_read_from_standard_input(engines, tmp_path_factory):
    with standard_input("héllo\n".encode(), tmp_path_factory.mktemp("in") / "text"):
        assert run.main(["prompt.path=-", "output=o", "generation.max_new_tokens=1"]) == 0
    assert result_of()["prompt_tokens"] == 7 and result_of()["config"]["prompt"]["path"] == "-"


@pytest.mark.parametrize("name", ["1.10", "007", "true", "v2 (final), a=b: 'c'", "~x~"])
def test_the_folder_of_a_run_is_called_as_typed(engines, name):
    typed = f"./{name}" if name.startswith("~") else name
    assert run.main([f"output={typed}", "prompt.text=x", "generation.max_new_tokens=1"]) == 0
    assert {path.name for path in Path().iterdir()} == {name}
    assert {path.name for path in Path(name).iterdir()} >= {"result.json", ".hydra"}


@pytest.mark.parametrize("override", ["output=~/runs/a", "hydra.run.dir=~/runs/a"])
def test_a_tilde_is_the_home_directory(engines, monkeypatch, tmp_path, override):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    Path("home/book.txt").write_text("hello")
    assert run.main([override, "prompt.path=~/book.txt", "generation.max_new_tokens=1"]) == 0
    assert [path.name for path in Path().iterdir()] == ["home"]
    result = result_of("home/runs/a")
    assert result["prompt_tokens"] == 5 and result["config"]["prompt"]["path"] == str(tmp_path / "home/book.txt")


def test_each_run_of_several_has_its_text_as_typed(engines):
    for name in ("2024.10", "2025.10"):
        Path(name).write_text(name)
    argv = ["-m", "hydra.sweep.dir=1.50", "prompt.path=2024.10,2025.10", "generation.max_new_tokens=1"]
    assert run.main(argv) == 0
    assert [result_of(f"1.50/{job}")["config"]["prompt"]["path"] for job in (0, 1)] == ["2024.10", "2025.10"]


@pytest.mark.parametrize("flags", [["-m"], ["--multirun"], ["--multi"], ["hydra.mode=MULTIRUN"]], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_several_runs_over_several_processes_are_refused_at_once(engines, capfd, monkeypatch, flags, rank):
    monkeypatch.setattr(run, "REFUSAL_SECONDS", 0.0)
    for name, value in {"WORLD_SIZE": "4", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    assert run.main([*flags, "sampling.seed=1,2"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == (rank == 0)
    assert rank or ("4 processes" in err and "python launch/sweep.py -m processes=4" in err)


# (environment, what must be named); more of them: command_line/test_cluster.py
CLUSTERS = [
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["MASTER_ADDR is None", "rank 0", "torchrun"]),
    ({"WORLD_SIZE": "2", "RANK": "1"}, ["MASTER_ADDR is None", "rank 0", "torchrun"]),
    ({"WORLD_SIZE": "", "RANK": "0"}, ["WORLD_SIZE is ''", ">= 1"]),
    ({"WORLD_SIZE": "2"}, ["RANK is None", "between 0 and 1", "WORLD_SIZE is 2"]),
]
OF_A_CLUSTER = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@pytest.fixture
def environment(monkeypatch):
    """The environment, without a word of a cluster."""
    for name in (*OF_A_CLUSTER, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def shown(variables: dict[str, str]) -> str:
    return ",".join(f"{name}={value[:9]}" for name, value in variables.items())


@pytest.mark.parametrize(("variables", "named"), CLUSTERS, ids=[shown(variables) for variables, _ in CLUSTERS])
def test_an_environment_that_is_half_a_cluster_is_refused(engines, capfd, environment, variables, named):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert run.main(["prompt.text=x", "output=o"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("tierforce: ") and err.count("\n") == 1 and all(part in err for part in named), err
    assert not Path("o").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_NODELIST": "n[1-2]", "SLURM_LOCALID": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": ""},
    ],
    ids=shown,
)
def test_what_makes_no_several_processes_changes_nothing(engines, environment, variables):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert run.main(["prompt.text=x", "output=o", "generation.max_new_tokens=1"]) == 0


@pytest.mark.parametrize(
    ("world_size", "argv", "named"),
    [
        ("2", ["placement=inline"], ["WORLD_SIZE is 2", "placement=inline", "1 (or"]),
        ("3", ["placement=pipeline"], ["WORLD_SIZE is 3", "4 or more", "a drafter, a retriever"]),
        ("5", ["placement.drafter_rank=5"], ["placement.drafter_rank is 5", "between 1 and 4"]),
        ("2", ["placement.device=cuda:1"], ["placement.device is 'cuda:1'", "auto, cpu or cuda"]),
    ],
)
def test_a_number_of_processes_that_does_not_suit_is_refused(engines, capfd, monkeypatch, world_size, argv, named):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "0")
    assert run.main(argv) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in named), err


def test_what_the_engine_refuses_is_a_message_too(engines, capfd):
    engines.build_error = ConfigError("cache.full.tier is 'device'; it must be auto: 3 GiB are needed, 2 GiB are free")
    assert run.main(["output=o", "prompt.max_tokens=9"]) == 2
    assert capfd.readouterr().err == f"tierforce: {engines.build_error}\n"


def test_a_document_that_is_cut_is_told_on_the_terminal_and_in_the_result(engines, capfd):
    Path("book.txt").write_bytes(b"It rained.\r\n" * 100)
    assert run.main(["output=o", "prompt.path=book.txt", "prompt.max_tokens=9", "generation.max_new_tokens=6"]) == 0
    positions = f"{MAX_POSITIONS - 5} reads as much as the model has positions for"
    assert f"prompt: 9 of 1,100 tokens read (prompt.max_tokens=9; {positions})" in capfd.readouterr().out
    assert result_of()["prompt"] == {
        "tokens_read": 9,
        "document_tokens": 1100,
        "document_tokens_are_exact": True,
        "is_cut": True,
        "frame": "nothing",
    }


def test_the_frame_and_doubtful_stops_are_told_on_the_terminal_and_in_the_result(engines, capfd, monkeypatch):
    argv = ["prompt.text=hello", "prompt.task=summary", "prompt.max_tokens=null", "generation.max_new_tokens=4"]
    monkeypatch.setattr(sys.modules[__name__], "MAX_POSITIONS", 1000)
    assert run.main(["output=o", *argv, 'generation.stop=["<|im_end|>", "\\n"]']) == 0
    out, result = capfd.readouterr().out, result_of()
    assert "plain USER/ASSISTANT frame, for the checkpoint has no chat template" in out
    assert "tokens read (" not in out and result["prompt"]["frame"] == "plain"
    assert "generation.stop has '<|im_end|>': it is no token of model.target" in out
    assert [(stop["text"], stop["token_id"], bool(stop["note"])) for stop in result["stops"]] == [
        ("<|im_end|>", None, True),
        ("\n", None, False),
    ]


def test_a_run_writes_the_contract(engines, capfd):
    argv = ["output=o", "prompt.text=hello", "generation.max_new_tokens=6", "sampling.seed=7", "decoding.gamma2=3"]
    assert run.main(argv) == 0
    result = result_of()
    assert set(result) >= {
        "prompt_tokens", "prompt", "stops", "token_ids", "text", "finish_reason", "seed", "config", "timing",
        "speculation", "memory", "streaming", "versions",
    }  # fmt: skip
    assert (result["prompt_tokens"], result["text"], result["finish_reason"]) == (5, "ababab", "length")
    assert result["generation_config"] == OF_FILE
    assert result["seed"] == 7 and result["config"]["decoding"]["gamma2"] == 3 and result["config"]["output"] == "o"
    assert set(result["timing"]) >= {"prefill_s", "ttft_s", "decode_s", "tbt_ms", "tokens_per_s"}
    assert [level["name"] for level in result["speculation"]["levels"]] == ["drafter", "retrieval"]
    assert len(Path("o/rounds.jsonl").read_text().splitlines()) == 4
    assert Path("o/.hydra/overrides.yaml").exists()
    out, err = capfd.readouterr()
    assert "ababab" in out and "tokens per verification" in out and "\x1b" not in out and err == ""
    assert engines.engine.is_closed


@pytest.mark.parametrize(("num_prompt", "num_generated"), [(64, 1), (63, 2), (60, 4)])
def test_generation_ends_where_the_model_does(engines, capfd, num_prompt, num_generated):
    argv = ["output=o", f"prompt.text={'x' * num_prompt}", "generation.max_new_tokens=4", "prompt.max_tokens=null"]
    assert run.main(argv) == 0
    result = result_of()
    assert len(result["token_ids"]) == num_generated and result["finish_reason"] == "length"
    assert ("is cut to" in capfd.readouterr().out) == (num_generated < 4)


def test_a_seed_that_is_left_open_is_drawn_and_reported(engines):
    seeds = []
    for folder in ("a", "b"):
        assert run.main([f"output={folder}", "sampling.seed=null", "prompt.text=x", "generation.max_new_tokens=1"]) == 0
        seeds.append(result_of(folder)["seed"])
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**53 for seed in seeds)


def test_a_sweep_runs_all_its_jobs_and_returns_the_worst_code(engines, capfd):
    argv = ["--multirun", "hydra.sweep.dir=m", "prompt.text=x", "generation.max_new_tokens=1", "sampling.seed=3,-1,4"]
    assert run.main(argv) == 2
    assert [result_of(f"m/{job}")["seed"] for job in (0, 2)] == [3, 4]
    assert result_of("m/2")["config"]["output"] == "m/2"
    assert "sampling.seed is -1" in capfd.readouterr().err


def fail_in(path: str):
    """A function that raises from a file of that name."""
    names: dict = {}
    source = (
        "def fail():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise OSError('x') from e\n"
    )
    exec(compile(source, path, "exec"), names)
    return names["fail"]


@pytest.mark.parametrize(
    ("point", "phase", "file", "role"),
    [
        ("start", "prefill", "/x/workers/target_verifier.py", "verifier"),
        (2, "decode", "/x/workers/target_verifier.py", "verifier"),
        (2, "decode", "/x/workers/retrieval_drafter.py", "retriever"),
        (2, "decode", "/x/workers/lookup_drafter.py", "drafter"),
        (2, "decode", "/x/other/drafter.py", "orchestrator"),
    ],
)
def test_a_failure_names_phase_role_rank_and_root_cause_in_one_line(engines, capfd, point, phase, file, role):
    fail = fail_in(file)
    engines.before = lambda now: fail() if now == point else None
    assert run.main(["output=o", "prompt.text=x"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert f"failed in phase {phase}, role {role}, rank 0: ZeroDivisionError: division by zero" in err
    assert "o/failure.log" in err and "Traceback" in Path("o/failure.log").read_text()
    assert engines.engine.is_closed
    generated = {"start": "", 2: "aba"}[point]
    assert (result_of()["finish_reason"], result_of()["text"]) == ("failed", generated)
    assert "OSError: x" in result_of()["failure"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_while_decoding_keeps_the_tokens(engines, capfd, number):
    engines.before = lambda point: os.kill(os.getpid(), number) if point == 2 else None
    assert run.main(["output=o", "prompt.text=x"]) == 130
    result = result_of()
    assert (result["finish_reason"], result["text"]) == ("interrupted", "ababa")
    assert "interrupted after 5 tokens" in capfd.readouterr().out
    assert engines.engine.is_closed


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(engines):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engines.before = lambda point: os.kill(os.getpid(), signal.SIGHUP) if point in ("start", 2) else None
        assert run.main(["output=o", "prompt.text=x", "generation.max_new_tokens=8"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert (result_of()["finish_reason"], result_of()["text"]) == ("length", "abababab")


def test_an_interruption_while_reading_the_prompt_ends_at_once(engines):
    engines.before = lambda point: (os.kill(os.getpid(), signal.SIGINT), time.sleep(5)) if point == "start" else None
    began = time.monotonic()
    assert run.main(["output=o", "prompt.text=x"]) == 130
    assert time.monotonic() - began < 4
    assert result_of()["token_ids"] == [] and result_of()["finish_reason"] == "interrupted"


def test_text_held_back_for_a_stop_string_is_in_an_interrupted_result(engines):
    engines.before = lambda point: os.kill(os.getpid(), signal.SIGINT) if point == 1 else None
    assert run.main(["output=o", "prompt.text=x", "generation.stop=[aX]"]) == 130
    assert result_of()["text"] == "aba"


def test_the_earlier_signal_handlers_come_back(engines):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    run.main(["output=o", "prompt.text=x"])
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_FOLDER / "model").glob("*.yaml")))
def test_every_pair_is_a_legal_configuration(name):
    config = read_config([f"model={name}"])
    assert config.model.target and config.model.drafter


# ---- No result is lost. ----

SHORT = ("prompt.text=x", "generation.max_new_tokens=8")


class FullTerminal(io.TextIOWrapper):
    """A terminal to which nothing can be written."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.TextIOWrapper, FullTerminal])
def test_a_display_that_is_gone_does_not_cost_the_result(engines, capfd, monkeypatch, kind):
    monkeypatch.setenv("TERM", "xterm")
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(sys, "stdout", kind(full))
        assert run.main(["output=o", *SHORT]) == 0
    assert (result_of()["text"], result_of()["finish_reason"]) == ("abababab", "length")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "tierforce: standard output is lost (No space left on device); the result is in o/result.json"
    assert all(line.startswith("tierforce: ") for line in lines)


def stop_the_clock(monkeypatch) -> None:
    """All that happens is in one second, as far as Hydra knows."""
    now = datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.setattr(hydra.core.utils, "datetime", SimpleNamespace(now=lambda: now))


def test_two_runs_of_one_second_have_a_folder_each(engines, monkeypatch):
    stop_the_clock(monkeypatch)
    folders = ["outputs/2026-01-02/03-04-05", "outputs/2026-01-02/03-04-05-2"]
    for seed in (1, 2):
        assert run.main([*SHORT, f"sampling.seed={seed}"]) == 0
    for seed, folder in enumerate(folders, start=1):
        assert result_of(folder)["seed"] == seed and result_of(folder)["config"]["output"] == folder
        assert f"sampling.seed={seed}" in Path(folder, ".hydra/overrides.yaml").read_text()
        assert f"seed: {seed}" in Path(folder, ".hydra/config.yaml").read_text()
        assert Path(folder).absolute().as_posix() in Path(folder, ".hydra/hydra.yaml").read_text()


@pytest.mark.parametrize(
    "argv", [("output=o",), ("hydra.run.dir=o",), ("-m", "hydra.sweep.dir=.", "hydra.sweep.subdir=o")]
)
def test_a_folder_where_another_run_is_at_work_is_refused_and_left_alone(engines, capfd, argv):
    with claim(Path("o").absolute(), is_chosen=True):
        before = sorted(Path("o").iterdir())
        assert run.main([*argv, *SHORT]) == 2
        assert sorted(Path("o").iterdir()) == before
    err = capfd.readouterr().err
    assert err.startswith("tierforce: output is 'o', where another run is at work") and err.count("\n") == 1, err
    assert run.main([*argv, *SHORT]) == 0


def test_jobs_of_two_sweeps_of_one_second_have_a_folder_each(engines, monkeypatch):
    stop_the_clock(monkeypatch)
    for _ in range(2):
        assert run.main(["-m", *SHORT, "sampling.seed=1,2"]) == 0
    seeds = {path.parent.name: result_of(path.parent)["seed"] for path in Path("multirun").rglob("result.json")}
    assert seeds == {"0": 1, "1": 2, "0-2": 1, "1-2": 2}


def test_a_disk_that_fills_while_decoding_costs_rounds_and_not_the_result(engines, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    engines.before = lambda point: point == 3 and resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert run.main(["output=o", "prompt.text=x", "generation.max_new_tokens=60"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result, lines = result_of(), Path("o/rounds.jsonl").read_text().splitlines()
    assert (len(result["token_ids"]), result["finish_reason"]) == (60, "length")
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines))) and 3 < len(lines) < 31
    assert result["incomplete_files"]["rounds.jsonl"].endswith(f"no rounds from {len(lines)} on")
    out, err = capfd.readouterr()
    assert out.count("rounds.jsonl ends here, the run goes on") == 1 and err == ""
    assert {path.name for path in Path("o").iterdir()} == {".hydra", "result.json", "rounds.jsonl"}


def test_a_disk_that_is_full_at_the_start_is_refused_and_an_earlier_result_stays(engines, capfd):
    assert run.main(["output=o", *SHORT]) == 0
    earlier = Path("o/result.json").read_text()
    capfd.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        assert run.main(["output=o", *SHORT]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capfd.readouterr().err
    assert err.startswith("tierforce: output is 'o'") and "bytes free" in err and err.count("\n") == 1, err
    assert Path("o/result.json").read_text() == earlier


def test_a_run_that_is_refused_while_it_loads_leaves_an_earlier_result(engines, capfd):
    assert run.main(["output=o", *SHORT]) == 0
    earlier = Path("o/result.json").read_text(), Path("o/rounds.jsonl").read_text()
    engines.build_error = ConfigError("a refusal")
    assert run.main(["output=o", *SHORT]) == 2
    assert (Path("o/result.json").read_text(), Path("o/rounds.jsonl").read_text()) == earlier


def test_a_rank_beside_the_one_that_shows_help_waits_for_nobody(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "Guard", lambda *_: pytest.fail("it waits for a run"))
    assert run.main(["--help"]) == 0


def test_a_result_that_cannot_be_written_at_all_is_printed(engines, capfd, monkeypatch):
    monkeypatch.setattr(run_files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert run.main(["output=o", *SHORT]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["text"] == "abababab"
    assert err.count("\n") == 1 and "failed in phase report" in err


def test_a_failure_after_the_last_token_leaves_the_whole_text(engines, capfd, monkeypatch):
    monkeypatch.setattr(FakeEngine, "memory_report", lambda self: 1 / 0)
    assert run.main(["output=o", *SHORT]) == 1
    assert (result_of()["text"], result_of()["finish_reason"]) == ("abababab", "length")
    assert "ZeroDivisionError" in result_of()["failure"]
    assert capfd.readouterr().err.count("\n") == 1


def test_tokens_of_a_round_that_broke_off_are_shown_too(engines, capfd):
    def commit_and_fail(point):
        if point == 2:
            engines.engine.hierarchy.session.commit([ord("c")])
            raise RuntimeError("half a round")

    engines.before = commit_and_fail
    assert run.main(["output=o", *SHORT]) == 1
    assert result_of()["text"] == "abac" and "abac" in capfd.readouterr().out


def test_paths_are_shown_as_one_types_them(engines, capfd, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output, shown in (
        ("o", "o"),
        ("./a/../b", "b"),
        ("../there", f"{tmp_path}/there"),
        (f"{tmp_path}/here/c", "c"),
    ):
        assert run.main([f"output={output}", *SHORT]) == 0
        assert capfd.readouterr().out.splitlines()[-1] == f"length after 8 tokens; {shown}/result.json"
        assert result_of(shown)["config"]["output"] == shown


@pytest.mark.parametrize(("budget", "is_told"), [([], False), (["cache.retrieval.budget=512"], True)])
def test_only_a_budget_that_the_user_chose_is_said_to_be_cut(engines, budget, is_told):
    with_known_budget(read_config(budget), 30, notes := [])
    assert notes == (["cache.retrieval.budget=512 is more than the prompt: cut to 32"] if is_told else [])
    assert run.main(["output=o", f"prompt.text={'x' * 30}", *budget]) == 0
    assert result_of()["retrieval_budget_tokens"] == 32


@pytest.mark.parametrize("argv", [["decoding.gamma1=-1"], ["output=o", "prompt.text=x"]])
def test_torchrun_is_told_what_the_user_is(engines, capfd, tmp_path, monkeypatch, argv):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    engines.before = lambda point: 1 / 0
    code = run.main(argv)
    line = capfd.readouterr().err.removeprefix("tierforce: ").strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(tmp_path / "error.json"))
    assert str(ChildFailedError("run.py", {0: failure})).splitlines()[-2] == f"  traceback : {line}"


# ---- As a user starts it. ----


def start(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_program_refuses_in_a_moment_without_torch(tmp_path):
    began = time.monotonic()
    done = start(sys.executable, str(PROGRAM), "decoding.gamma1=four", cwd=tmp_path)
    assert done.returncode == 2 and time.monotonic() - began < 5
    assert done.stderr == "tierforce: decoding.gamma1 is 'four'; it must be an integer or auto, for example 2\n"
    assert done.stdout == ""
    check = "import sys, launch.run; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    assert start(sys.executable, "-c", check, cwd=PROGRAM.parents[1]).returncode == 0


@pytest.mark.parametrize(("flags", "expected"), [(["--cfg", "job"], "gamma1: 2"), (["--help"], "llama2-7b-128k")])
def test_the_flags_of_hydra_work(tmp_path, flags, expected):
    done = start(sys.executable, str(PROGRAM), *flags, cwd=tmp_path)
    assert done.returncode == 0 and expected in done.stdout
