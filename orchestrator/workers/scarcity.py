"""Workers are asked more often how many legs other orchestrators have there while nearly all seats are taken.

Each report may say that there is room again for somebody who waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from orchestrator.config.options import DEFAULT_SEATS, Config
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker

SEATED: Final[tuple[Role, Role]] = ("decode", "both")
LEFT: Final = 1 / 16  # of the seats, or less: they are scarce
OFTEN_S: Final = 0.1  # between two probes then
MOST_PER_S: Final = 40.0  # probes of the workers of a model then: each takes us up to a millisecond


class Scarcity:
    """It belongs to the prober of an orchestrator."""

    def __init__(self, config: Config, pools: Mapping[str, Pools]) -> None:
        self._pools = pools
        self._seats = {(m.name, role): pool.seats for m in config.models for role, pool in m.pools()}

    def pause_s(self, worker: Worker, usual_s: float) -> float:
        """Return how long to wait before a worker is probed again, where that would be `usual_s` as a rule.

        One without our plugin is not asked more often: its metrics take it some milliseconds.
        """
        if worker.introduction.info is None or worker.address.role not in SEATED:
            return usual_s
        workers = self._seated(worker.address.model)
        often_s = max(OFTEN_S, len(workers) / MOST_PER_S)
        return often_s if often_s < usual_s and self._are_scarce(workers) else usual_s

    def _seated(self, model: str) -> tuple[Worker, ...]:
        pools = self._pools[model]
        return (*pools.decode, *pools.both) if pools.both else pools.decode

    def _are_scarce(self, workers: tuple[Worker, ...]) -> bool:
        """Tell whether there are others, and hardly any seats left."""
        if not any(worker.others for worker in workers):
            return False
        addresses = [worker.address for worker in workers]
        seats = sum(self._seats.get((address.model, address.role), DEFAULT_SEATS) for address in addresses)
        return sum(worker.in_flight for worker in workers) >= (1 - LEFT) * seats
