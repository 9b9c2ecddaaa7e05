"""The lifecycle holds on every schedule that was tried. A failing seed is replayed by
`python -m tests.simulation SEED`."""

from __future__ import annotations

import os

import pytest

from tests.simulation.many import failures

SEEDS = int(os.environ.get("BATON_SIMULATION_SEEDS", "10000"))
FIRST = int(os.environ.get("BATON_SIMULATION_FIRST_SEED", "0"))


@pytest.mark.timeout(SEEDS / 10)
def test_nothing_is_lost_or_left_behind_on_any_schedule() -> None:
    found = failures(range(FIRST, FIRST + SEEDS))
    assert not found, "\n".join([*found, "replay with: python -m tests.simulation SEED"])
