"""Orchestrators may read the EndpointSlices of their namespace, and nothing else of Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.cluster import Cluster
from launch.render.tree import Object, Tree

_GROUP = "rbac.authorization.k8s.io"


def access(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield account, role and binding, each with the name of its file."""
    name, own = account(cluster), labels.orchestrators(cluster)
    rule: dict[str, Tree] = {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }
    subject: dict[str, Tree] = {"kind": "ServiceAccount", "name": name, "namespace": cluster.namespace}
    role: dict[str, Tree] = {"apiGroup": _GROUP, "kind": "Role", "name": name}
    version = f"{_GROUP}/v1"
    yield "access", labels.thing(cluster, "v1", "ServiceAccount", name, own)
    yield "access", labels.thing(cluster, version, "Role", name, own, rules=[rule])
    yield (
        "access",
        labels.thing(cluster, version, "RoleBinding", name, own, roleRef=role, subjects=[subject]),
    )


def account(cluster: Cluster) -> str:
    return f"{cluster.name}-orchestrator"
