"""What the tests of structure read: the product's modules as files, and their imports without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("conf", "tiers", "workers", "orchestrator", "launch")
"""From left to right: each may import those before it."""

MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path, *, while_type_checking: bool = True) -> set[str]:
    """Names of modules: `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in nodes_of(ast.parse(path.read_text(encoding="utf-8")), while_type_checking):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def nodes_of(node: ast.AST, while_type_checking: bool) -> Iterator[ast.AST]:
    """All nodes; on request without those for type checkers alone."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not while_type_checking:
        return
    for child in ast.iter_child_nodes(node):
        yield from nodes_of(child, while_type_checking)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
