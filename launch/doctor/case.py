"""A case is what the doctor looks at: a config, the machine around, and what would be started from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.engines.base import Surroundings
from launch.plan import Plan, ProcessSpec
from orchestrator.config.addresses import WorkerAddress, WorkerPlace, worker_addresses, worker_places
from orchestrator.config.options import Config


@dataclass(frozen=True, slots=True)
class Case:
    config: Config
    around: Surroundings
    plan: Plan | None  # None if it cannot be carried out
    running: frozenset[str] = field(default_factory=frozenset)  # processes of the plan that answer already

    @property
    def specs(self) -> tuple[ProcessSpec, ...]:
        return () if self.plan is None else self.plan.here

    def workers(self) -> Iterator[tuple[WorkerPlace, WorkerAddress]]:
        """Return all workers of the file, wherever they run."""
        return zip(worker_places(self.config), worker_addresses(self.config), strict=True)

    def here(self, engine: str, device: str | None = None) -> list[WorkerPlace]:
        """Return the workers that this machine would run with that engine."""
        return [
            place
            for place, address in self.workers()
            if address.is_managed
            and self.around.is_here(address.host)
            and place.pool.engine == engine
            and (device is None or place.pool.device == device)
        ]

    def spec(self, name: str) -> ProcessSpec | None:
        return next((spec for spec in self.specs if spec.name == name), None)
