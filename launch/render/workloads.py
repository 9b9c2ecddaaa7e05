"""The workers of a role run as a workload of one kind: here it is chosen, and what it is called to others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch.render import disaggregated_set as sets
from launch.render import leader_worker_set as groups
from launch.render.cluster import Cluster, RolePool
from launch.render.deployment import deployment
from launch.render.names import slug
from launch.render.tree import Object
from orchestrator.config.options import ModelConfig
from orchestrator.wire.info import Role

SET_ROLES: tuple[Role, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Scalable:
    """An autoscaler changes the replicas of this object."""

    version: str
    kind: str
    name: str


def workloads(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield the workloads of all pools, each with the name of its file."""
    for model in cluster.config.models:
        together = [pool for pool in cluster.of_model(model) if is_in_set(cluster, pool)]
        if together:
            yield f"set-{slug(model.name)}", sets.disaggregated_set(cluster, together)
        for pool in cluster.of_model(model):
            if pool not in together:
                made = groups.leader_worker_set if is_grouped(cluster, pool) else deployment
                yield file_of(pool), made(cluster, pool)


def file_of(pool: RolePool) -> str:
    return f"workers-{slug(pool.model.name)}-{pool.role}"


def is_in_set(cluster: Cluster, pool: RolePool) -> bool:
    """Tell whether a pool is a role of a DisaggregatedSet, which needs both."""
    wanted = cluster.options.workload == "disaggregatedset"
    return wanted and pool.role in SET_ROLES and _has_both(cluster, pool.model)


def _has_both(cluster: Cluster, model: ModelConfig) -> bool:
    return {pool.role for pool in cluster.of_model(model)}.issuperset(SET_ROLES)


def is_grouped(cluster: Cluster, pool: RolePool) -> bool:
    """Tell whether LeaderWorkerSets run the pods, by themselves or in a DisaggregatedSet."""
    return pool.span > 1 or cluster.options.workload == "lws" or is_in_set(cluster, pool)


def scalable(cluster: Cluster, pool: RolePool) -> Scalable:
    """Return what an autoscaler changes to scale a pool."""
    if is_in_set(cluster, pool):
        return Scalable(sets.VERSION, sets.SCALER_KIND, sets.scaler_name(cluster, pool))
    if is_grouped(cluster, pool):
        return Scalable(groups.VERSION, groups.KIND, groups.set_name(pool))
    return Scalable("apps/v1", "Deployment", pool.name)
