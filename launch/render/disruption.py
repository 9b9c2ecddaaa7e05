"""PodDisruptionBudgets: whoever drains nodes takes one pod of a kind at a time, and always gets on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from launch.render import labels
from launch.render.cluster import Cluster
from launch.render.tree import Noted, Object, Tree
from launch.render.workloads import file_of


def budgets(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield them, each with the name of its file."""
    yield "orchestrator", _budget(cluster, f"{cluster.name}-orchestrator", labels.orchestrators(cluster))
    for pool in cluster.pools:
        yield file_of(pool), _budget(cluster, pool.name, labels.selector(cluster, pool))


def _budget(cluster: Cluster, name: str, own: Mapping[str, str]) -> Object:
    spec: dict[str, Tree] = {
        "maxUnavailable": Noted(
            1, "With minAvailable a single pod would keep its node from being drained for ever."
        ),
        "unhealthyPodEvictionPolicy": Noted("AlwaysAllow", "A pod that does not serve protects nothing."),
        "selector": {"matchLabels": dict(own)},
    }
    return labels.thing(cluster, "policy/v1", "PodDisruptionBudget", name, dict(own), spec=spec)
