"""The plan of the house: no import circles, layers in launch, sizes to survey at a glance, one meaning for a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support.source_code import MODULES, ROOT, imports_of, name_of

LAYERS = (
    ("command_line",),
    ("prompts",),
    ("demo_pair",),
    ("assembly",),
    ("processes",),
    ("forecast", "benchmark", "sweeps", "analysis"),
    ("measure",),
)
"""Rooms of launch: each may import itself and rooms of the layers before its own. The programs, files directly in
launch, come last and may import all."""

MAX_LINES = 350
LONG_BECAUSE = "Long because"
"""Line of a module docstring that begins so gives the reason why the file is longer."""
MAX_FILES = 20


def module_of(path: Path, root: Path) -> str:
    """Dotted name of a file; a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(paths: Iterable[Path], root: Path, *, while_type_checking: bool = True) -> dict[str, set[str]]:
    """Of every module the modules that it imports, anywhere in the file; only those among `paths` count."""
    files = {module_of(path, root): path for path in paths}
    return {
        name: (imports_of(path, while_type_checking=while_type_checking) & files.keys()) - {name}
        for name, path in files.items()
    }


def import_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle, the first one again at its end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def layer_of(module: str) -> int:
    """Index of a module of launch in LAYERS; that of a program is one more than the last."""
    room = module.split(".")[1] if "." in module else ""
    return next((index for index, rooms in enumerate(LAYERS) if room in rooms), len(LAYERS))


def wrong_layers(graph: dict[str, set[str]]) -> list[str]:
    """Imports inside launch that point to a later layer, or to another room of the same one."""
    return [
        f"{module} imports {imported}"
        for module, names in graph.items()
        for imported in names
        if module.startswith("launch.") and imported.startswith("launch.") and not may_import(module, imported)
    ]


def may_import(module: str, imported: str) -> bool:
    same_room = module.split(".")[1] == imported.split(".")[1] or layer_of(module) == len(LAYERS)
    return layer_of(imported) < layer_of(module) or (layer_of(imported) == layer_of(module) and same_room)


def is_too_long(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    return len(text.splitlines()) > MAX_LINES and not any(line.startswith(LONG_BECAUSE) for line in lines)


def full_folders(paths: Iterable[Path]) -> list[Path]:
    """Folders with more Python files than one surveys at a glance."""
    files = defaultdict(list)
    for path in paths:
        if path.name != "__init__.py":
            files[path.parent].append(path)
    return [folder for folder, inside in files.items() if len(inside) > MAX_FILES]


def classes_of(path: Path) -> list[str]:
    """Names of the classes at a module's top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.ClassDef)]


def names_with_two_meanings(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Class names that more than one module defines, with these files."""
    files = defaultdict(list)
    for path in paths:
        for name in classes_of(path):
            files[name].append(path.as_posix())
    return {name: found for name, found in files.items() if len(found) > 1}


def test_no_import_circles():
    assert not import_circle(import_graph(MODULES, ROOT, while_type_checking=False))


def test_no_import_circles_for_type_checkers_either():
    assert not import_circle(import_graph(MODULES, ROOT))


def test_rooms_of_launch_are_layers():
    rooms = {path.name for path in (ROOT / "launch").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {room for layer in LAYERS for room in layer}
    assert not wrong_layers(import_graph(MODULES, ROOT))


def test_no_file_is_too_long():
    assert not [name_of(path) for path in MODULES if is_too_long(path)]


def test_no_folder_is_too_full():
    tests = (ROOT / "tests").rglob("*.py")
    assert not [name_of(folder) for folder in full_folders([*MODULES, *tests])]


def test_a_class_name_has_one_meaning():
    assert not names_with_two_meanings(path.relative_to(ROOT) for path in MODULES)


def test_packages_are_named_one_by_one_for_the_wheel():
    named = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in {path.parent for path in MODULES}:
        assert (package / "__init__.py").is_file(), package
        assert f'"{module_of(package / "__init__.py", ROOT)}"' in named, package


# ---- Negative controls: each fault is seen. ----


def write(root: Path, files: dict[str, str]) -> list[Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return [root / name for name in files]


def test_control_a_circle_is_seen_in_functions_and_for_type_checkers(tmp_path):
    in_function = write(tmp_path, {"a/x.py": "from a.y import f", "a/y.py": "def f():\n    import a.x"})
    assert set(import_circle(import_graph(in_function, tmp_path))) == {"a.x", "a.y"}
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b import x\n"
    for_types = write(tmp_path, {"b/x.py": "import b.y", "b/y.py": checked})
    assert set(import_circle(import_graph(for_types, tmp_path))) == {"b.x", "b.y"}
    assert not import_circle(import_graph(for_types, tmp_path, while_type_checking=False))


def test_control_a_later_layer_and_a_neighbour_are_seen():
    graph = {
        "launch.assembly.engine": {"launch.prompts.prompt", "launch.processes.guard"},
        "launch.sweeps.job": {"launch.benchmark.table", "launch.sweeps.config"},
        "launch.measure.gpu": {"launch.run"},
        "launch.bench": {"launch.run", "launch.measure.gpu"},
    }
    assert wrong_layers(graph) == [
        "launch.assembly.engine imports launch.processes.guard",
        "launch.sweeps.job imports launch.benchmark.table",
        "launch.measure.gpu imports launch.run",
    ]


def test_control_sizes_and_names_are_seen(tmp_path):
    lines = "x = 1\n" * (MAX_LINES + 1)
    long, excused = write(
        tmp_path, {"a.py": lines, "b.py": f'"""One table.\n\n{LONG_BECAUSE} it is one.\n"""\n{lines}'}
    )
    assert is_too_long(long) and not is_too_long(excused)
    many = write(tmp_path, {f"full/m{index}.py": "class Row: ..." for index in range(MAX_FILES + 1)})
    assert full_folders(many) == [tmp_path / "full"] and not full_folders(many[1:])
    assert names_with_two_meanings(many[:2]) == {"Row": [path.as_posix() for path in many[:2]]}
    assert not names_with_two_meanings(many[:1])
