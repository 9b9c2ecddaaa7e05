"""The table of policies in the docs is that of the code."""

from __future__ import annotations

from orchestrator.compiled import ROOT
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Argument, PolicySpec


def row(spec: PolicySpec) -> str:
    arguments = "; ".join(map(described, spec.arguments)) or "none"
    return f"| `{spec.name}` | {spec.description} | {arguments} |"


def described(argument: Argument) -> str:
    return f"`{argument.name}: {argument.default}`: {argument.description}"


def test_the_docs_have_a_row_for_each_policy() -> None:
    lines = (ROOT / "docs/structure.md").read_text().splitlines()
    start = lines.index("| policy | what it does | arguments |") + 2
    assert lines[start : start + len(POLICIES)] == [row(spec) for spec in POLICIES.values()]
    assert not lines[start + len(POLICIES)].startswith("|")
