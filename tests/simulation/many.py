"""Many seeds, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.invariants import check
from tests.simulation.simulate import simulate

_PER_TASK = 250


def failures(seeds: Sequence[int], *, most: int = 5) -> list[str]:
    """What is wrong with the runs of these seeds, the first few; each line names its seed."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit whatever other tests have open
    found: list[str] = []
    with ProcessPoolExecutor(os.cpu_count(), context) as executor:
        parts = [seeds[start : start + _PER_TASK] for start in range(0, len(seeds), _PER_TASK)]
        for part in executor.map(failures_here, parts):
            found += part
            if len(found) >= most:
                executor.shutdown(cancel_futures=True)
                break
    return found[:most]


def failures_here(seeds: Iterable[int]) -> list[str]:
    """The same in this process, and all of them."""
    return [f"seed {seed}: {problem}" for seed in seeds for problem in problems(seed)]


def problems(seed: int) -> list[str]:
    try:
        return check(simulate(seed))
    except Exception:  # a deadlock, or a bug in the simulation
        return [traceback.format_exc()]
