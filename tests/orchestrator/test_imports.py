"""A name is imported from the module that defines it, so that each has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from orchestrator.compiled import ROOT

PACKAGES = ("orchestrator", "launch", "worker", "bench", "tests")
# Modules that hand on names of others on purpose: callers of the seam need no second import.
SEAMS = frozenset({("orchestrator.transport.base", "Answer")})

Import = tuple[str, str, str]  # importer, module, name


def trees() -> dict[str, ast.Module]:
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {_module_of(path): ast.parse(path.read_text()) for path in paths}


def _module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def defined_in(tree: ast.Module) -> set[str]:
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = list(ast.walk(tree))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.name for node in nodes if isinstance(node, named)}


def imports_of(importer: str, tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((importer, node.module, alias.name) for alias in node.names if alias.name != "*")


def test_names_are_imported_from_where_they_are_defined() -> None:
    modules = trees()
    defined = {name: defined_in(tree) for name, tree in modules.items()}
    strangers = [
        (importer, module, name)
        for each, tree in modules.items()
        for importer, module, name in imports_of(each, tree)
        if module in defined
        and name not in defined[module]
        and f"{module}.{name}" not in modules
        and (module, name) not in SEAMS
    ]
    assert not strangers
