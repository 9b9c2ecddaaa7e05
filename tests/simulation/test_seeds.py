"""The lifecycle holds on every schedule that was tried. A failing seed is replayed by
`python -m tests.simulation SEED`."""

from __future__ import annotations

import os

import pytest

from tests.simulation.seeds import problems

SEEDS = int(os.environ.get("BATON_SIMULATION_SEEDS", "10000"))
FIRST = int(os.environ.get("BATON_SIMULATION_FIRST_SEED", "0"))
AT_ONCE = 250


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, AT_ONCE))
def test_nothing_is_lost_or_left_behind_on_any_schedule(first: int) -> None:
    seeds = range(first, min(first + AT_ONCE, FIRST + SEEDS))
    found = [f"seed {seed}: {problem}" for seed in seeds for problem in problems(seed)]
    assert not found, "\n".join([*found[:5], "replay with: python -m tests.simulation SEED"])
