"""A LeaderWorkerSet runs engines that span several pods: each is a group, whose first pod serves requests."""

from __future__ import annotations

from launch.render import labels
from launch.render.cluster import Cluster, RolePool
from launch.render.deployment import surge
from launch.render.tree import Noted, Object, Tree, without_none
from launch.render.worker_pod import follower_template, template

VERSION = "leaderworkerset.x-k8s.io/v1"
KIND = "LeaderWorkerSet"


def leader_worker_set(cluster: Cluster, pool: RolePool) -> Object:
    replicas = cluster.replicas_of(pool)
    spec = without_none(replicas=replicas, **group_spec(cluster, pool))
    return labels.thing(cluster, VERSION, KIND, set_name(pool), labels.selector(cluster, pool), spec=spec)


def set_name(pool: RolePool) -> str:
    """Return the name of the set. Its controller makes a Service of this name for pods that are not ready
    yet, so our own Service must have another one.
    """
    return f"{pool.name}-lws"


def group_spec(cluster: Cluster, pool: RolePool) -> dict[str, Tree]:
    """Return what a LeaderWorkerSet and a role of a DisaggregatedSet have in common, without replicas."""
    leader, follower = template(cluster, pool, in_sets=True), follower_template(cluster, pool)
    group: dict[str, Tree] = {
        "size": pool.span,
        "restartPolicy": Noted(
            "RecreateGroupOnPodRestart", "An engine that lost a part of itself is of no use."
        ),
        **({} if follower is None else {"leaderTemplate": leader}),
        "workerTemplate": leader if follower is None else follower,
    }
    return {
        "startupPolicy": "LeaderCreated",
        "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": surge(cluster)},
        "leaderWorkerTemplate": group,
    }
