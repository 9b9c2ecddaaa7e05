"""LoRA adapters are served by workers of their base model: by those that list them, where any do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.workers.pools import ROLES, Pools
from orchestrator.workers.worker import Worker


class Adapters:
    """It knows the adapters of all models, and has pools for those that were asked for. Only the registry
    changes it.
    """

    def __init__(self, listed: Mapping[str, Iterable[str]], make: Callable[[str], Pools]) -> None:
        """`listed` are those of the config, by model: they are there whether or not a worker lists them.
        `make` makes the pools of a model.
        """
        self._listed = {model: frozenset(names) for model, names in listed.items()}
        self._make = make
        self._names = dict(self._listed)  # of each model
        self._members: dict[str, tuple[Worker, ...]] = {}
        self._pools: dict[str, Pools] = {}  # by adapter

    def of_model(self, model: str) -> list[str]:
        """Return the adapters of a model that can be asked for, in order."""
        return sorted(self._names.get(model, ()))

    def find(self, name: str) -> Pools | None:
        """Return the workers that serve an adapter, `Pools.model` being its base model; None if nobody knows
        it. Of models that have an adapter of the same name the first one counts.
        """
        model = next((model for model, names in self._names.items() if name in names), None)
        if model is None:
            return None
        pools = self._pools.get(name)
        if pools is None or pools.model != model:
            pools = self._pools[name] = self._make(model)
            pools.update(self._having(name, model))
        return pools

    def update(self, model: str, members: Iterable[Worker]) -> None:
        """Note who serves a model, and what they list."""
        self._members[model] = found = tuple(members)
        listed = self._listed.get(model, frozenset())
        self._names[model] = listed.union(*[worker.introduction.adapters for worker in found])
        for name, pools in list(self._pools.items()):
            if pools.model != model:
                continue
            if name in self._names[model]:
                pools.update(self._having(name, model))
            else:
                del self._pools[name]

    def reconfigure(self, health: HealthConfig, routing: RoutingConfig) -> None:
        """Judge workers by these sections from the next `update` on."""
        for pools in self._pools.values():
            pools.reconfigure(health, routing)

    def rest(self, worker: Worker, seconds: float) -> None:
        """Let a worker rest, as `Pools.rest` does."""
        for pools in self._pools.values():
            if pools.model == worker.address.model:
                pools.rest(worker, seconds)

    def _having(self, name: str, model: str) -> list[Worker]:
        """Return the workers that list it. Of a role in which nobody does, all are taken if the config lists
        it: engines may load it when it is asked for.
        """
        found: list[Worker] = []
        for role in ROLES:
            members = [worker for worker in self._members.get(model, ()) if worker.address.role == role]
            having = [worker for worker in members if name in worker.introduction.adapters]
            found += having or (members if name in self._listed.get(model, ()) else [])
        return found
