"""Labels say whose an object is; those of `selector` never change while it lives."""

from __future__ import annotations

from launch.render.cluster import Cluster, RolePool
from launch.render.names import slug
from launch.render.tree import Object, Tree

ORCHESTRATOR = "orchestrator"
LEADER_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"  # the controller puts it on pods; 0 serves requests

_NAME, _INSTANCE, _COMPONENT = (f"app.kubernetes.io/{word}" for word in ("name", "instance", "component"))
_MODEL = "baton/model"
REVISION = "baton/revision"


def everything(cluster: Cluster) -> dict[str, str]:
    """Return the labels that all our pods have."""
    return {_NAME: "baton", _INSTANCE: cluster.name}


def orchestrators(cluster: Cluster) -> dict[str, str]:
    return {**everything(cluster), _COMPONENT: ORCHESTRATOR}


def model(cluster: Cluster, pool: RolePool) -> dict[str, str]:
    """Return what the workers of all roles of a model have in common."""
    return {**everything(cluster), _MODEL: slug(pool.model.name)}


def selector(cluster: Cluster, pool: RolePool) -> dict[str, str]:
    return {**model(cluster, pool), _COMPONENT: pool.role}


def serving(cluster: Cluster, pool: RolePool, *, in_sets: bool) -> dict[str, str]:
    """Return the labels of the pods that serve requests: of an engine over several pods the first one."""
    return {**selector(cluster, pool), **({LEADER_LABEL: "0"} if in_sets else {})}


def pod(cluster: Cluster, pool: RolePool) -> dict[str, Tree]:
    return {**selector(cluster, pool), REVISION: cluster.revision_of(pool)}


def thing(
    cluster: Cluster, version: str, kind: str, name: str, labels: dict[str, str], **parts: Tree
) -> Object:
    """Return an object of a kind, with what such objects are described by."""
    metadata: dict[str, Tree] = {"name": name, "namespace": cluster.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **parts}
