"""Ejection on suspicion, as decisions over a pool: who may go, who must come back, and when to ask again."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from orchestrator.config.options import HealthConfig
from orchestrator.workers.states import ON_SUSPICION, REACHABLE
from orchestrator.workers.worker import Worker

MAX_DOUBLINGS = 30  # far beyond any useful pause; keeps the number small


def may_be_out(worker: Worker, pool: Sequence[Worker]) -> bool:
    """Whether at most half of what is left of the pool is out, with this worker among it.

    When most workers look ill, it is more likely that the one who looks is.
    """
    others_out = sum(other.state in ON_SUSPICION for other in pool if other is not worker)
    return others_out + 1 <= _reachable(pool) // 2


def called_back(pool: Sequence[Worker]) -> Worker | None:
    """Who has to serve again, as too few others are left: the one that has failed least. Else None."""
    out = [worker for worker in pool if worker.state in ON_SUSPICION]
    if len(out) <= _reachable(pool) // 2:
        return None
    return min(out, key=lambda worker: worker.ejections)


def pause_s(ejections: int, health: HealthConfig, random: Random) -> float:
    """Until a worker is asked again that was ejected so many times in a row before."""
    longest_s = min(health.eject_s * 2.0 ** min(ejections, MAX_DOUBLINGS), health.eject_max_s)
    return longest_s * random.uniform(0.5, 1.0)


def _reachable(pool: Sequence[Worker]) -> int:
    return sum(worker.state in REACHABLE for worker in pool)
