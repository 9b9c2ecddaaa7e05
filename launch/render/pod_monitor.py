"""PodMonitors tell Prometheus's operator where the metrics of all pods are."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.cluster import Cluster
from launch.render.orchestrator import ADMIN_PORT_NAME
from launch.render.tree import Noted, Object, Tree, without_none
from launch.render.worker_pod import PORT_NAME

_VERSION = "monitoring.coreos.com/v1"
_INTERVAL = "15s"


def pod_monitors(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield them, each with the name of its file."""
    if not cluster.options.monitoring:
        return
    own = labels.orchestrators(cluster)
    yield "monitoring", _monitor(cluster, "orchestrator", {"matchLabels": own}, _admin(cluster))
    if cluster.pools:
        roles: list[Tree] = [*sorted({pool.role for pool in cluster.pools})]
        component = {"key": "app.kubernetes.io/component", "operator": "In", "values": roles}
        workers: dict[str, Tree] = {
            "matchLabels": labels.everything(cluster),
            "matchExpressions": [component],
        }
        endpoint: dict[str, Tree] = {"port": PORT_NAME, "path": "/metrics", "interval": _INTERVAL}
        yield "monitoring", _monitor(cluster, "workers", workers, endpoint)


def _admin(cluster: Cluster) -> dict[str, Tree]:
    """Return where an orchestrator's metrics are, and with which key they are read."""
    key: dict[str, Tree] = {"credentials": {"name": cluster.options.secrets.metrics_key, "key": "key"}}
    unverified = Noted(
        {"insecureSkipVerify": True}, "Its certificate is for clients' names, not for a pod's address."
    )
    return without_none(
        port=ADMIN_PORT_NAME,
        path="/metrics",
        interval=_INTERVAL,
        scheme="https" if cluster.has_tls else None,
        tlsConfig=unverified if cluster.has_tls else None,
        authorization=None if cluster.api_keys_secret is None else key,
    )


def _monitor(cluster: Cluster, what: str, selector: Tree, endpoint: dict[str, Tree]) -> Object:
    name = f"{cluster.name}-{what}"
    spec: Tree = {"selector": selector, "podMetricsEndpoints": [endpoint]}
    return labels.thing(cluster, _VERSION, "PodMonitor", name, labels.everything(cluster), spec=spec)
