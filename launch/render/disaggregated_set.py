"""A DisaggregatedSet runs the prefill and decode workers of a model, and rolls both roles together."""

from __future__ import annotations

from collections.abc import Sequence

from launch.render import labels
from launch.render.cluster import Cluster, RolePool
from launch.render.leader_worker_set import group_spec
from launch.render.tree import Noted, Object, Tree, without_none

VERSION = "disaggregatedset.x-k8s.io/v1"
SCALER_KIND = "DisaggregatedSetRoleScaler"


def disaggregated_set(cluster: Cluster, pools: Sequence[RolePool]) -> Object:
    """Return the set of two roles or more of one model."""
    own = labels.model(cluster, pools[0])
    name = cluster.set_name(pools[0].model)
    roles = [_role(cluster, pool) for pool in pools]
    return labels.thing(cluster, VERSION, "DisaggregatedSet", name, own, spec={"roles": roles})


def scaler_name(cluster: Cluster, pool: RolePool) -> str:
    """Return the name of the object by which a role is scaled; the controller makes it."""
    return f"{cluster.set_name(pool.model)}-{pool.role}"


def _role(cluster: Cluster, pool: RolePool) -> Tree:
    follows = cluster.is_autoscaled(pool)
    external = Noted({"mode": "External"}, "Its autoscaler says how many there are.")
    spec = without_none(replicas=cluster.replicas_of(pool), **group_spec(cluster, pool))
    return without_none(name=pool.role, scaling=external if follows else None, spec=spec)
