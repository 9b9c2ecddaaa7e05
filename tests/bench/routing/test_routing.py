"""The comparison of routers, on small traces of our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.routing import __main__ as comparison
from bench.routing.agentic import GROUP_BLOCKS, SHARED_BLOCKS, agentic
from bench.routing.cases import Case, of_agents, of_file
from bench.routing.formulas import FORMULAS, enter
from bench.routing.rules import RULES
from launch.simulate.trace import Arrival
from orchestrator.routing.policies import POLICIES
from tests.launch.simulate.sites import conversations


@pytest.fixture
def formulas() -> Iterator[None]:
    before = dict(POLICIES)
    enter()
    yield
    POLICIES.clear()
    POLICIES.update(before)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    rows = conversations(400, rate=6.0)
    for name in ("conversation_trace.jsonl", "synthetic_trace.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"2023-11-16 18:17:{index // 10:02}.{index % 10}000000,2000,20" for index in range(200)]
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    (tmp_path / "AzureLLMInferenceTrace_code.csv").write_text("\n".join([header, *lines]))
    return tmp_path


def case(traces: Path, **options: object) -> Case:
    trace = of_file(traces, "conversation*")
    assert trace is not None
    return Case("conversation", trace, 1.0, 4, 4, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("formulas")
def test_formulas_use_caches(traces: Path) -> None:
    found = {name: case(traces).figures(name, range(1)) for name in ("round_robin", *FORMULAS)}
    for name in FORMULAS:
        assert found[name]["cached_ratio"] > found["round_robin"]["cached_ratio"], name
        assert found[name]["refused"] == 0


@pytest.mark.usefixtures("formulas")
def test_an_idle_site_is_the_same_to_those_that_reckon_time_and_to_us(traces: Path) -> None:
    found = [case(traces).at(0.05).figures(name, range(1)) for name in ("conductor", "prefix")]
    assert found[0]["ttft_p50_s"] == pytest.approx(found[1]["ttft_p50_s"], rel=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_one_worker_serve_what_it_says(traces: Path, rule: str) -> None:
    figures = case(traces).figures(f"prefix@always/{rule}", range(1))
    assert 0.0 < figures["whole"] < 1.0


def test_engines_that_are_slower_than_expected_make_the_same_load(traces: Path) -> None:
    figures = [
        case(traces, slowness=slowness).figures("least_loaded", range(1)) for slowness in (1.0, 3.0, 0.25)
    ]
    for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "good", "cached_ratio"):
        assert [found[name] for found in figures] == pytest.approx([figures[0][name]] * 3, rel=1e-6), name


def test_sessions_of_agents() -> None:
    trace = agentic(20, 0.5, 1)
    assert [arrival.at_s for arrival in trace.arrivals] == sorted(arrival.at_s for arrival in trace.arrivals)
    turns = [turn for first in trace.arrivals for turn in turns_of(first)]
    assert len({turn.index for turn in turns}) == len(turns)
    assert len({tuple(turn.blocks[:SHARED_BLOCKS]) for turn in turns}) == 1
    for first in trace.arrivals:
        for before, after in zip(turns_of(first), turns_of(first)[1:], strict=False):
            assert after.blocks[: len(before.blocks)] == before.blocks
            assert after.prompt_tokens > before.prompt_tokens
    assert 1 < len({turn.blocks[GROUP_BLOCKS - 1] for turn in turns}) <= 20
    assert agentic(20, 0.5, 1).arrivals[3].prompt_tokens == trace.arrivals[3].prompt_tokens


def turns_of(first: Arrival) -> list[Arrival]:
    turns, turn = [first], first.after
    while turn is not None:
        turns.append(turn)
        turn = turn.after
    return turns


def test_turns_come_one_after_the_other() -> None:
    figures = Case("agents", of_agents(5, 1.0), 1.0, 2, 2).figures("prefix", range(1))
    assert figures["cached_ratio"] > 0.5


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("table", ["policies", "conditions", "slow", "modes", "carried"])
def test_all_tables(
    traces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(comparison, "of_agents", lambda sessions, rate: of_agents(3, rate))
    monkeypatch.setattr(comparison, "CLOSE", 1.0)
    options = ["--trace-dir", str(traces), "--seeds", "1", "--only", table, "--policies", "prefix,smg"]
    monkeypatch.setattr(sys, "argv", ["bench.routing", *options])
    assert comparison.main() == 0
    assert f"### {table}" in capsys.readouterr().out
