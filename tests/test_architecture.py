"""The rooms of the orchestrator lie on floors, imports point down, and others see little of it. Functions are
short, and no class is large.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.structure.__main__ import (
    MOST_ATTRIBUTES,
    MOST_LINES_90TH,
    MOST_LINES_MEDIAN,
    MOST_METHODS,
    ORDER,
    class_sizes,
    function_sizes,
    read_modules,
    typical,
)

ROOT = Path(__file__).parents[1]
ROOMS = ORDER.split()  # from the top down: folders, or modules beside them

Arrow = tuple[str, str, str]  # the importing module, what it imports, and where: FILE:LINE

# What of the orchestrator each may import; `launch/bench` less, by a test of its own.
ALLOWED = {
    "worker": ("orchestrator.wire",),
    "launch": (
        "orchestrator.__version__",
        "orchestrator.compiled",  # what has a compiled form, for `launch/compile.py`
        "orchestrator.config",
        "orchestrator.control.reload",  # where a running orchestrator gets its config from
        "orchestrator.discovery",  # `baton discover` asks the sources that an orchestrator would
        "orchestrator.errors",
        "orchestrator.form",  # which form runs, and whether there is a build
        "orchestrator.interpreter",  # what its children import is what ours do
        "orchestrator.legs.connectors",  # the doctor's own legs: pure, and known to the config too
        "orchestrator.loop.bounded_calls",  # file systems that hang do so to both
        "orchestrator.loop.signals",
        "orchestrator.relay.admission",  # this and what follows: `launch/simulate` runs them in virtual time
        "orchestrator.relay.waiting",
        "orchestrator.routing",
        "orchestrator.run",
        "orchestrator.scaling",
        "orchestrator.telemetry",
        "orchestrator.transport",
        "orchestrator.wire",
        "orchestrator.workers",
    ),
}

PACKAGES = ("orchestrator", "worker", "launch", "bench")


def arrows(package: str) -> Iterator[Arrow]:
    for file in sorted((ROOT / package).rglob("*.py")):
        path = file.relative_to(ROOT)
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for name in imported(node):
                if name.startswith("orchestrator."):
                    yield module, name, f"{path}:{getattr(node, 'lineno', 0)}"


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """The room of a module of the orchestrator, or of a name in one."""
    _, first, *rest = name.split(".")
    inner = ".".join([first, *rest[:1]])
    return inner if inner in ROOMS else first


def file_of(name: str) -> str:
    """The module that a name is, or is in."""
    path = ROOT / name.replace(".", "/")
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return name if is_module else name.rpartition(".")[0]


def test_every_room_has_its_floor() -> None:
    found = {room_of(module) for module, *_ in arrows("orchestrator")} - {"__init__"}
    assert found <= set(ROOMS)


def test_every_import_points_down() -> None:
    wrong = [
        f"{place}: {room_of(module)} must not import {room_of(name)}"
        for module, name, place in arrows("orchestrator")
        if name != "orchestrator.__version__" and ROOMS.index(room_of(module)) > ROOMS.index(room_of(name))
    ]
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    graph: dict[str, dict[str, str]] = {}
    for module, name, place in arrows("orchestrator"):
        graph.setdefault(module, {})[file_of(name)] = place
    wrong = [
        place
        for module, found in graph.items()
        for name, place in found.items()
        if leads(graph, name, module)
    ]
    assert wrong == []


def leads(graph: dict[str, dict[str, str]], start: str, end: str) -> bool:
    """Whether imports lead from one module to the other."""
    found: set[str] = set()
    ahead = {start}
    while ahead:
        found |= ahead
        ahead = {name for module in ahead for name in graph.get(module, {})} - found
    return end in found


@pytest.mark.parametrize("package", ALLOWED)
def test_what_stands_beside_the_orchestrator_sees_only_what_it_may(package: str) -> None:
    wrong = [
        f"{place}: {package} must not import {name}"
        for _, name, place in arrows(package)
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[package])
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_is_large(package: str) -> None:
    wrong = [
        f"{size.place}: {size.name} has {size.methods} methods and {size.attributes} attributes"
        for size in class_sizes(ROOT / package, read_modules(ROOT / package))
        if size.methods > MOST_METHODS or size.attributes > MOST_ATTRIBUTES
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    median, percentile_90 = typical(function_sizes(read_modules(ROOT / package)))
    assert median <= MOST_LINES_MEDIAN
    assert percentile_90 <= MOST_LINES_90TH
