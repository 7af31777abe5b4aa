"""What documents, configurations and docstrings point at is there: files, modules, names in them, links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.schema import RunConfig
from launch.forecast.config import PlanConfig
from tests.support.source_code import FOLDERS, MODULES, ROOT, name_of
from tests.unit.test_readme import keys_of

DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets/demo/README.md", *(ROOT / "docs").glob("*.md")]
)
CONFIGURATIONS = [*sorted((ROOT / "conf").rglob("*.yaml")), ROOT / ".pre-commit-config.yaml", ROOT / "pyproject.toml"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
KEYS = keys_of(RunConfig()) | keys_of(PlanConfig())

START = r"(?<![\w./:-])"
PATH = re.compile(rf"{START}(?:{'|'.join(FOLDERS)}|tests|docs|assets|\.ci)/[\w./-]*[\w/]")
FILE_NAME = re.compile(rf"{START}[a-z]\w*\.py\b")
MODULE = re.compile(r"python -m ((?:launch|tests)(?:\.\w+)+)")
DOTTED = re.compile(rf"{START}(?:{'|'.join(FOLDERS)}|tests)(?:\.[a-zA-Z_]\w*)+")
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(?:#[^)]*)?\)")


def missing_paths(text: str, root: Path = ROOT) -> list[str]:
    """Paths that begin with a folder of the project; NAME in one stands for any."""
    return [path for path in PATH.findall(text) if "NAME" not in path and not (root / path).exists()]


def missing_file_names(text: str, names: set[str]) -> list[str]:
    """Python files named without their folder."""
    return [name for name in FILE_NAME.findall(text) if name not in names]


def missing_modules(text: str) -> list[str]:
    """Modules started by `python -m`."""
    return [name for name in MODULE.findall(text) if not is_there(name)]


def missing_dotted(text: str) -> list[str]:
    """Names that are neither modules or names in them, nor keys of the configuration."""
    return [name for name in DOTTED.findall(text) if name not in KEYS and not is_there(name)]


def missing_links(document: Path, text: str) -> list[str]:
    """Links to files, relative to the document's folder."""
    return [link for link in LINK.findall(text) if not (document.parent / link).exists()]


def is_there(dotted: str) -> bool:
    """Whether a name like conf.schema.RunConfig is that of a package, a module, or something that the module names.

    NAME stands for any: launch.measure.NAME.
    """
    parts = dotted.removesuffix(".NAME").split(".")
    for length in range(len(parts), 0, -1):
        path, rest = ROOT.joinpath(*parts[:length]), parts[length:]
        if path.with_suffix(".py").is_file():
            return not rest or rest[0] in set(names_in(path.with_suffix(".py")))
        if path.is_dir():
            return not rest
    return False


def names_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def prose_of(path: Path) -> str:
    """Docstrings and comments of a Python file."""
    text = path.read_text(encoding="utf-8")
    nodes = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join([*strings, *re.findall(r"(?:^|\s)# (.*)", text)])


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGURATIONS], ids=name_of)
def test_a_document_points_at_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    names = {file.name for file in [*MODULES, *TESTS]}
    assert not missing_paths(text)
    assert not missing_file_names(text, names)
    assert not missing_modules(text)
    assert not missing_dotted(text)
    assert not missing_links(path, text)


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_docstrings_and_comments_point_at_what_is_there(folder):
    """But for names of files without a folder in tests, where some are made up."""
    names, wrong = {file.name for file in MODULES}, {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        # Negative controls name what is not there.
        prose = prose_of(path) if path.name not in ("test_references.py", "test_structure.py") else ""
        missing = missing_paths(prose) + missing_modules(prose) + missing_dotted(prose)
        missing += missing_file_names(prose, names) if folder != "tests" else []
        if missing:
            wrong[name_of(path)] = missing
    assert not wrong


def test_control_what_is_missing_is_seen(tmp_path):
    text = "See `launch/run.py` and `tiers/nowhere.py`, docs/, conf/model/none.yaml.\n"
    assert missing_paths(text) == ["tiers/nowhere.py", "conf/model/none.yaml"]
    assert missing_file_names("`crew.py`, `nobody.py`; x/other.py", {"crew.py"}) == ["nobody.py"]
    assert missing_modules("python -m launch.measure.NAME, python -m launch.nothing.x") == ["launch.nothing.x"]
    dotted = "conf.schema, conf.schema.RunConfig, tiers.disk.folder; conf.schema.Nothing, tiers.disk.chair"
    assert missing_dotted(dotted) == ["conf.schema.Nothing", "tiers.disk.chair"]
    (tmp_path / "there.md").touch()
    links = "[a](there.md#part) [b](gone.md) [c](https://example.org/x) [d](#here)"
    assert missing_links(tmp_path / "document.md", links) == ["gone.md"]
