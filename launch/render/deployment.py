"""A Deployment runs the workers of a role, if each engine fits into one pod."""

from __future__ import annotations

from launch.render import labels
from launch.render.cluster import Cluster, RolePool
from launch.render.pods import WARM_UP_S, rollout_s
from launch.render.tree import Noted, Object, Tree, without_none
from launch.render.worker_pod import template


def deployment(cluster: Cluster, pool: RolePool) -> Object:
    own = labels.selector(cluster, pool)
    spec = without_none(
        replicas=cluster.replicas_of(pool),
        minReadySeconds=warm_up(),
        progressDeadlineSeconds=rollout_s(cluster),
        revisionHistoryLimit=3,
        strategy={"type": "RollingUpdate", "rollingUpdate": surge(cluster)},
        selector={"matchLabels": own},
        template=template(cluster, pool, in_sets=False),
    )
    return labels.thing(cluster, "apps/v1", "Deployment", pool.name, own, spec=spec)


def warm_up() -> Tree:
    return Noted(WARM_UP_S, "A new pod is known to all orchestrators before an old one ends.")


def surge(cluster: Cluster) -> Tree:
    """Return how many pods a rollout adds, and how many it takes away at a time."""
    if cluster.options.spare_gpus:
        return Noted({"maxSurge": 1, "maxUnavailable": 0}, "A new pod serves before an old one is drained.")
    return Noted(
        {"maxSurge": 0, "maxUnavailable": 1},
        "There is no GPU to spare: a pod is drained and ends before a new one starts.",
    )
