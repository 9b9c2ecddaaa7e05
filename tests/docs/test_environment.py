"""docs/environment.md names every variable of ours, and no other."""

from __future__ import annotations

import re

from orchestrator.compiled import ROOT
from tests.docs.pages import read

OURS = re.compile(r"\bBATON_[A-Z_]+")
SOURCES = [
    ROOT / "setup.py",
    *(p for d in ("orchestrator", "launch", "worker") for p in (ROOT / d).rglob("*.py")),
]


def test_the_table_has_them_all() -> None:
    rows = [
        line for line in read("docs/environment.md").sections()[0].text.splitlines() if line.startswith("| `")
    ]
    named = {name for row in rows for name in OURS.findall(row.split("|")[1])}
    assert named == {name for path in SOURCES for name in OURS.findall(path.read_text("utf-8"))}
