"""An HTTPRoute leads from a Gateway to the orchestrators."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.cluster import Cluster
from launch.render.tree import Noted, Object, Tree


def http_routes(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield it with the name of its file, if there is a Gateway."""
    gateway = cluster.options.gateway
    if gateway is None:
        return
    namespace, _, name = gateway.rpartition("/")
    parent: dict[str, Tree] = {"name": name, **({"namespace": namespace} if namespace else {})}
    rule: dict[str, Tree] = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
        "backendRefs": [{"name": cluster.name, "port": cluster.listen_port}],
        "timeouts": Noted(
            {"request": "0s"}, "A stream may last longer than gateways let requests take; we have limits."
        ),
    }
    hosts: list[Tree] = [*cluster.options.hostnames]
    spec: dict[str, Tree] = {
        "parentRefs": [parent],
        **({"hostnames": hosts} if hosts else {}),
        "rules": [rule],
    }
    own = labels.orchestrators(cluster)
    yield (
        "gateway",
        labels.thing(cluster, "gateway.networking.k8s.io/v1", "HTTPRoute", cluster.name, own, spec=spec),
    )
