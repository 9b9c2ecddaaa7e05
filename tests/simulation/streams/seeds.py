"""What is wrong with the run of a seed."""

from __future__ import annotations

import traceback

from tests.simulation.streams.invariants import check
from tests.simulation.streams.simulate import simulate


def problems(seed: int) -> list[str]:
    try:
        return check(simulate(seed))
    except Exception:  # a deadlock, or a bug in the simulation
        return [traceback.format_exc()]
