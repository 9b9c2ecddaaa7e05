"""The docs name the modules that there are, and no others."""

from __future__ import annotations

import re

import pytest

from orchestrator.compiled import ROOT

PACKAGES = ("orchestrator", "launch", "worker")
ROW = re.compile(r"^\| `(.+)/` \| (.*) \|$")
FIRST = "| orchestrator/ | its modules |"
BENCH = "| bench/ | measures, each as `python -m bench.NAME` |"  # no row per folder there
MODULE = re.compile(r"`(\w+\.py)`")


def documented() -> dict[str, list[str]]:
    """The modules in each row of the tables in docs/structure.md, by folder."""
    lines = (ROOT / "docs/structure.md").read_text().splitlines()
    start, end = map(lines.index, (FIRST, BENCH))
    rows = filter(None, map(ROW.match, lines[start:end]))
    return {folder_of(row[1]): MODULE.findall(row[2]) for row in rows}


def folder_of(title: str) -> str:
    return title if title.split("/")[0] in PACKAGES else f"orchestrator/{title}"


def folders() -> list[str]:
    """All folders that have modules, from the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted({str(path.parent.relative_to(ROOT)) for path in files})


def test_there_is_a_row_for_each_folder() -> None:
    assert sorted(documented()) == folders()


@pytest.mark.parametrize("folder", folders())
def test_each_module_is_in_the_row_of_its_folder(folder: str) -> None:
    modules = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert sorted(documented()[folder]) == sorted(modules)
