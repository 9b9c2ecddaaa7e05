"""Requests over one connection are whole, or an error, on every schedule that was tried. A failing seed is
replayed by `python -m tests.simulation.streams SEED`.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from orchestrator.compiled import is_compiled
from tests.simulation.streams.schedule import Schedule, draw
from tests.simulation.streams.seeds import problems
from tests.simulation.streams.simulate import simulate

# A tenth of what the simulation of clusters tries: a connection has fewer states.
SEEDS = int(os.environ.get("BATON_SIMULATION_SEEDS", "10000")) // 10
FIRST = int(os.environ.get("BATON_SIMULATION_FIRST_SEED", "0"))
AT_ONCE = 100


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, AT_ONCE))
def test_every_request_gets_its_own_bytes_and_nothing_is_left(first: int) -> None:
    seeds = range(first, min(first + AT_ONCE, FIRST + SEEDS))
    found = [f"seed {seed}: {problem}" for seed in seeds for problem in problems(seed)]
    assert not found, "\n".join([*found[:5], "replay with: python -m tests.simulation.streams SEED"])


def test_schedules_are_of_all_kinds() -> None:
    counts = Counter(kind for seed in range(500) for kind in kinds(draw(seed)))
    assert all(count >= 20 for count in counts.values())
    assert len(counts) == 11


def kinds(schedule: Schedule) -> list[str]:
    return [
        "calm" if schedule.is_calm else "troubled",
        "tiny window" if schedule.window < 100 else "large window",
        "few streams" if schedule.max_streams < 10 else "many streams",
        *("silent link" for link in schedule.links if link.is_silenced),
        *("cut link" for link in schedule.links if not (link.is_silenced or link.is_whole)),
        *(trouble.trouble.name for trouble in schedule.troubles),
    ]


def test_a_seed_says_everything() -> None:
    for seed in range(20):
        assert [str(event) for event in simulate(seed).trace] == [
            str(event) for event in simulate(seed).trace
        ]


def test_most_requests_are_streams_and_most_are_whole() -> None:
    results = [simulate(seed) for seed in range(100)]
    links = [rules for result in results for rules in result.rules]
    outcomes = [outcome for result in results for outcome in result.outcomes]
    assert sum(rules.is_multiplexed for rules in links) > len(links) / 2
    assert sum(outcome.is_complete for outcome in outcomes) > len(outcomes) / 3
    if not is_compiled():
        assert sum(rules.has_refused for rules in links) > 1
