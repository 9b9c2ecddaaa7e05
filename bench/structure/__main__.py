"""This prints the architecture in figures: rooms, arrows between them, sizes, and the way of a request.

    python -m bench.structure [--root CHECKOUT]... [--order "run app relay ... wire errors"]

A room is a folder of orchestrator/ or a module beside the folders, and a folder in a folder; an arrow is an
import, wherever it stands; the floors are the rooms of the longest chain of arrows, where a circle counts as
one. An import points upward if the order names the importer's room after the other one. A function has a
line for its head, and those of its body without the docstring. Attributes are what a class names in its body
or slots and what its `__init__` sets. The request is a plain chat through prefill and decode
(tests/orchestrator/fakes.py). A move is a call, a return or an await that goes on, if it leads to another
file, or room; the compiled form hides them.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.shared.command import parser
from bench.shared.processes import ROOT, python

ORDER = (
    "run processes app relay failover legs control discovery api routing scaling loop http workers telemetry "
    "transport config legs.connectors routing.policies wire errors interpreter form compiled"
)
INNER = {"legs.connectors", "routing.policies"}  # leaves, which the config may know
LONG = 40  # lines
# tests/test_architecture.py holds these bounds in all packages.
MOST_METHODS, MOST_ATTRIBUTES = 30, 25  # of a class
MOST_LINES_MEDIAN, MOST_LINES_90TH = 5, 13  # of the functions of a package

Modules = Mapping[str, ast.Module]  # by dotted name below the package; a folder's `__init__` by the folder's
Graph = Mapping[str, set[str]]  # what each imports
Function = ast.FunctionDef | ast.AsyncFunctionDef


class ClassSize(NamedTuple):
    """A class has so many methods and attributes."""

    name: str
    place: str  # FILE:LINE
    methods: int
    attributes: int


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--root", type=Path, action="append", help="a checkout; several become columns")
    options.add_argument("--order", default=ORDER, help="rooms from the top down; default: %(default)s")
    arguments = options.parse_args()
    roots = [root.resolve() for root in arguments.root or [ROOT]]
    columns = [figures(root / "orchestrator", arguments.order.split()) | request(root) for root in roots]
    print("\n".join(side_by_side([str(root) for root in roots], columns)))


def side_by_side(titles: list[str], columns: list[dict[str, list[str]]]) -> list[str]:
    """Return the lines of a table: a row has as many of them as its longest cell."""
    heights = {name: max(len(cells[name]) for cells in columns) for name in columns[0]}
    blocks = []
    for title, cells in zip(["", *titles], [{name: [name] for name in heights}, *columns], strict=True):
        lines = [title]
        for name, height in heights.items():
            lines += [*cells[name], *[""] * (height - len(cells[name]))]
        blocks.append([line.ljust(max(map(len, lines))) for line in lines])
    return ["  ".join(row).rstrip() for row in zip(*blocks, strict=True)]


def figures(package: Path, order: list[str]) -> dict[str, list[str]]:
    modules = read_modules(package)
    graph = imports(modules, package.name)
    rooms = rooms_of(graph)
    sizes, classes = function_sizes(modules), class_sizes(package, modules)
    median, percentile_90 = typical(sizes)
    return {
        "rooms": [f"{len(rooms)}, {sum(map(len, rooms.values()))} arrows"],
        "modules": [f"{len(modules)}, {sum(map(len, graph.values()))} arrows"],
        "floors": [str(floors(rooms))],
        "circles of rooms": listed(map(" ".join, circles(rooms))),
        "circles of modules": listed(map(" ".join, circles(graph))),
        "imports upward": listed(upward(graph, order)),
        "functions": [f"{len(sizes)}, {sum(lines > LONG for lines in sizes)} over {LONG} lines"],
        "  lines": [f"median {median:.0f}, 90th percentile {percentile_90}"],
        "most methods": largest((size.methods, size.name) for size in classes),
        "most attributes": largest((size.attributes, size.name) for size in classes),
    }


def request(root: Path) -> dict[str, list[str]]:
    """Trace a request in a process of its own, on the checkout's modules."""
    command = python(str(Path(__file__).with_name("request.py")), f"{root / 'orchestrator'}{os.sep}")
    traced = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": str(root)}, text=True)
    return {"a request": traced.splitlines()}


def listed(found: Iterable[str]) -> list[str]:
    lines = sorted(found)
    return [str(len(lines)), *lines]


def read_modules(package: Path) -> Modules:
    """Parse the package, but for its own `__init__`."""
    modules = {}
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = ast.parse(file.read_text("utf-8"))
    modules.pop("__init__", None)
    return modules


def imports(modules: Modules, package: str) -> Graph:
    """Give each module the others that it imports; relative names are not looked for."""
    graph = {}
    for name, tree in modules.items():
        inside = [full.partition(".")[2] for full in imported(tree) if room_of(full) == package]
        either = {full if full in modules else full.rpartition(".")[0] for full in inside}
        graph[name] = (either & modules.keys()) - {name}
    return graph


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """Return its folder; a folder in a folder is a room of its own."""
    folders = module.split(".")
    return ".".join(folders[:2]) if ".".join(folders[:2]) in INNER else folders[0]


def rooms_of(graph: Graph) -> Graph:
    return {
        room: {room_of(target) for name in graph if room_of(name) == room for target in graph[name]} - {room}
        for room in map(room_of, graph)
    }


def reach(graph: Graph, start: str) -> set[str]:
    """Return all that `start` imports, directly or not; itself only if it is in a circle."""
    found: set[str] = set()
    ahead = {start}
    while ahead:
        ahead = {target for name in ahead for target in graph[name]} - found
        found |= ahead
    return found


def circles(graph: Graph) -> list[list[str]]:
    reached = {name: reach(graph, name) for name in graph}
    rings = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return [sorted(ring) for ring in rings if ring]


def floors(graph: Graph) -> int:
    reached = {name: reach(graph, name) for name in graph}

    @cache
    def height(name: str) -> int:
        return 1 + max((height(other) for other in reached[name] if name not in reached[other]), default=0)

    return max(map(height, graph))


def upward(graph: Graph, order: list[str]) -> Iterator[str]:
    """Yield the imports that point upward. Rooms that the order leaves out are not judged."""
    rank = {room: at for at, room in enumerate(order)}
    for name, target in ((name, one) for name, targets in graph.items() for one in targets):
        if rank.get(room_of(target), len(rank)) < rank.get(room_of(name), -1):
            yield f"{name} imports {target}"


def nodes(modules: Modules, kind: Any) -> Iterator[Any]:
    return (node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, kind))


def lines_of(function: Function) -> int:
    first = function.body[ast.get_docstring(function) is not None and len(function.body) > 1]
    return (function.end_lineno or first.lineno) - first.lineno + 2


def function_sizes(modules: Modules) -> list[int]:
    """Return the lines of all functions, the shortest first."""
    return sorted(map(lines_of, nodes(modules, Function)))


def typical(sizes: list[int]) -> tuple[float, int]:
    """Return the median and the 90th percentile of sorted sizes."""
    return statistics.median(sizes), sizes[len(sizes) * 9 // 10]


def class_sizes(package: Path, modules: Modules) -> list[ClassSize]:
    return [
        ClassSize(
            node.name, f"{file_of(package, name)}:{node.lineno}", len(methods(node)), len(attributes(node))
        )
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]


def file_of(package: Path, module: str) -> Path:
    """Return the file of a module, from the folder that the package is in."""
    path = package / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.relative_to(package.parent)


def largest(counts: Iterable[tuple[int, str]]) -> list[str]:
    """Return the three classes with the most members: the number, the name."""
    return [f"{count} {name}" for count, name in sorted(counts, reverse=True)[:3]]


def methods(node: ast.ClassDef) -> set[str]:
    return {one.name for one in node.body if isinstance(one, Function)}


def attributes(node: ast.ClassDef) -> set[str]:
    inits = [one for one in node.body if getattr(one, "name", "") == "__init__"]
    assigns = [one for one in node.body if isinstance(one, (ast.Assign, ast.AnnAssign))]
    slots = [one.value for one in assigns if "__slots__" in stored(one) and one.value]
    named = {name for one in assigns for name in stored(one)} - {"__slots__"}
    named |= {name[5:] for one in inits for name in stored(one) if name.startswith("self.")}
    return named.union(*map(ast.literal_eval, slots))


def stored(tree: ast.AST) -> set[str]:
    """Return all that is assigned to, as it is written."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)}


if __name__ == "__main__":
    main()
