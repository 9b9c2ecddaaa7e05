"""What is measured has a core of its own, if there are two."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """The routers run on one core, each at its time; the workers and the load on the other."""

    router: Set[int]
    other: Set[int]


def share_cores() -> Cores:
    """Move this process, which makes some load, to the workers' core; the routers get another one."""
    mine = sorted(os.sched_getaffinity(0))
    cores = Cores(router={mine[0]}, other={mine[-1]})
    os.sched_setaffinity(0, cores.other)
    return cores
