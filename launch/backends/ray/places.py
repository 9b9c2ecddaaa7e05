"""Placement groups keep places for workers: Ray reserves what a worker needs, wherever it has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from launch.backends.ray.watch import Watched

LOOK_S: Final = 1.0  # between two looks at the places of workers that do not run
PENDING_S: Final = 2.0  # until a missing place is told of: a free one is found in a fraction of that
_NODE: Final = "ray.io/node-id"


class Pool(msgspec.Struct):
    """The workers of a pool need the same."""

    name: str  # MODEL/ROLE
    workers: list[str]
    bundle: dict[str, float]  # what each of them takes
    is_spread: bool  # each on a node of its own, always


class Places:
    """Each worker has a group of its own, which is given up with it; softly they go to different nodes.

    The workers of a pool that must be spread share a group, as Ray spreads within one only. Such a group is
    given up with the run: until then another worker of the pool may take the place of one that was stopped.
    """

    def __init__(self, ray: Any, namespace: str, pools: Iterable[Pool]) -> None:
        self._ray = ray
        self._namespace = namespace
        self._pools = {pool.name: pool for pool in pools}
        self._groups: dict[str, tuple[Any, int]] = {}  # by worker: its group, and its bundle there
        self._shared: dict[str, tuple[Any, list[str | None]]] = {}  # by pool: who has which bundle
        self._looked_at = 0.0
        self._told: dict[str, str | None] = {}

    def options(self, name: str) -> dict[str, Any]:
        """Return what puts the actor of a worker into its place; it has one from now on."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        pool = self._pool(name)
        if name not in self._groups:
            self._groups[name] = self._shared_place(pool, name) or self._own_place(pool, name)
        group, index = self._groups[name]
        return {
            "num_cpus": pool.bundle.get("CPU", 0),
            "num_gpus": pool.bundle.get("GPU", 0),
            "resources": {key: value for key, value in pool.bundle.items() if key not in ("CPU", "GPU")},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            ),
        }

    def _pool(self, name: str) -> Pool:
        return self._pools[name.rpartition("/")[0]]

    def _shared_place(self, pool: Pool, name: str) -> tuple[Any, int] | None:
        """Return a place in the group of a pool that must be spread; None where it has no free one."""
        if not pool.is_spread:
            return None
        if pool.name not in self._shared:
            group = self._group(pool.name, [pool.bundle] * len(pool.workers), strategy="STRICT_SPREAD")
            self._shared[pool.name] = group, [None] * len(pool.workers)
        group, taken = self._shared[pool.name]
        if None not in taken:
            return None
        index = pool.workers.index(name) if name in pool.workers else taken.index(None)
        index = index if taken[index] is None else taken.index(None)
        taken[index] = name
        return group, index

    def _own_place(self, pool: Pool, name: str) -> tuple[Any, int]:
        if pool.is_spread:  # beyond its group
            others = [node for node in self._nodes_of(pool).elements() if node]
            apart = [{_NODE: f"!in({','.join(others)})"}] if others else None
            return self._group(name, [pool.bundle], strategy="PACK", bundle_label_selector=apart), 0
        node = self._emptiest(pool)
        return self._group(name, [pool.bundle], strategy="STRICT_PACK", _soft_target_node_id=node), 0

    def _group(self, what: str, bundles: Sequence[Mapping[str, float]], **options: Any) -> Any:
        """Return the group of that name: one of before, or a new one."""
        name = f"{self._namespace}:{what}"
        try:
            return self._ray.util.get_placement_group(name)
        except ValueError:
            return self._ray.util.placement_group(bundles, name=name, lifetime="detached", **options)

    def _emptiest(self, pool: Pool) -> str | None:
        """Return the node with the fewest workers of the pool, then of all, of those that may have room."""
        of_pool, of_all = self._nodes_of(pool), self._nodes_of(None)
        nodes = [node for node in self._ray.nodes() if node["Alive"] and _has(node["Resources"], pool.bundle)]
        found = sorted((of_pool[node["NodeID"]], of_all[node["NodeID"]], node["NodeID"]) for node in nodes)
        return found[0][2] if found else None

    def _nodes_of(self, pool: Pool | None) -> Counter[str]:
        """Return how many workers, of a pool or of all, each node has."""
        nodes: Counter[str] = Counter()
        for name, (group, index) in self._groups.items():
            if pool is None or self._pool(name) is pool:
                nodes[self._table(group)["bundles_to_node_id"][index]] += 1
        return nodes

    def _table(self, group: Any) -> Mapping[str, Any]:
        table: Mapping[str, Any] = self._ray.util.placement_group_table(group)
        return table

    def release(self, name: str) -> None:
        """Give up the place of a worker that was ended."""
        group, index = self._groups.pop(name, (None, 0))
        self._told.pop(name, None)
        shared = self._shared.get(name.rpartition("/")[0])
        if shared is not None and group is shared[0]:
            shared[1][index] = None
        elif group is not None:
            self._ray.util.remove_placement_group(group)

    # --- what is missing --------------------------------------------------------------------------

    def look(self, now: float, watched: Iterable[Watched]) -> Iterator[tuple[str, str | None]]:
        """Yield what keeps workers from running, by name, where that is new; None once nothing does."""
        if now < self._looked_at + LOOK_S:
            return
        self._looked_at = now
        for worker in watched:
            trouble = None if worker.is_reached else self._trouble(worker, now)
            if trouble != self._told.get(worker.name):
                self._told[worker.name] = trouble
                yield worker.name, trouble

    def _trouble(self, worker: Watched, now: float) -> str | None:
        group, _ = self._groups[worker.name]
        if now < worker.lost_at + PENDING_S:
            return self._told.get(worker.name)
        if self._table(group)["state"] in ("PENDING", "RESCHEDULING"):
            return f"no place for it: {self._missing(self._pool(worker.name))}"
        return (
            "out of reach: Ray starts it again once it knows that it is lost" if worker.was_reached else None
        )

    def _missing(self, pool: Pool) -> str:
        """Return what the cluster has not, or not now, that a worker needs."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = _described(pool.bundle)
        fitting = sum(_has(node, pool.bundle) for node in nodes)
        if not fitting:
            most = _described({key: _most(nodes, key) for key in pool.bundle})
            return f"a worker of {pool.name} needs {needs} on one node, and no node has more than {most}"
        if pool.is_spread and fitting < len(pool.workers):
            return (
                f"{pool.name} needs {len(pool.workers)} nodes with {needs} each (launch.ray.spread: node), "
                f"and there are {fitting}"
            )
        free = {key: self._ray.available_resources().get(key, 0.0) for key in pool.bundle}
        return (
            f"a worker of {pool.name} needs {needs}, and all that the cluster has free is {_described(free)}"
        )


def _most(nodes: Iterable[Mapping[str, float]], key: str) -> float:
    return max((node.get(key, 0.0) for node in nodes), default=0.0)


def _has(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(resources.get(key, 0.0) >= value for key, value in bundle.items())


def _described(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in resources.items())
