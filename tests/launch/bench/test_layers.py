from __future__ import annotations

import ast
from pathlib import Path

import launch.bench

# The transport and the SSE reader, and what they take and raise: a load tool needs a pooled client too.
ALLOWED = (
    "orchestrator.transport",
    "orchestrator.wire.judge",
    "orchestrator.wire.sse",
    "orchestrator.wire.headers",
    "orchestrator.errors",
)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_the_load_tool_knows_little_of_what_it_measures() -> None:
    files = list(Path(launch.bench.__path__[0]).glob("*.py"))
    assert files
    names = {name for file in files for name in imports(file)}
    ours = {name for name in names if name.partition(".")[0] in ("orchestrator", "worker", "launch")}
    strange = {name for name in ours if not name.startswith((*ALLOWED, "launch.bench", "launch.exits"))}
    assert strange == set()
