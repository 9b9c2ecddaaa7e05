"""Services: one before the orchestrators, and one without an address of its own for each pool of workers."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.cluster import WORKER_PORT, Cluster, RolePool
from launch.render.tree import Noted, Object, Tree
from launch.render.worker_pod import PORT_NAME
from launch.render.workloads import file_of, is_grouped

API_PORT_NAME = "http"


def services(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield them, each with the name of its file."""
    yield "orchestrator", _api(cluster)
    for pool in cluster.pools:
        yield file_of(pool), _pool(cluster, pool)


def _api(cluster: Cluster) -> Object:
    own = labels.orchestrators(cluster)
    protocol = "https" if cluster.has_tls else "http"
    port: dict[str, Tree] = {
        "name": API_PORT_NAME,
        "port": cluster.listen_port,
        "targetPort": API_PORT_NAME,
        "appProtocol": protocol,
    }
    spec: dict[str, Tree] = {"type": cluster.options.service_type, "selector": own, "ports": [port]}
    return labels.thing(cluster, "v1", "Service", cluster.name, own, spec=spec)


def _pool(cluster: Cluster, pool: RolePool) -> Object:
    serving = labels.serving(cluster, pool, in_sets=is_grouped(cluster, pool))
    why = "Orchestrators watch its EndpointSlices and choose the pod themselves."
    spec: dict[str, Tree] = {
        "clusterIP": Noted("None", why),
        "selector": serving,
        "ports": [{"name": PORT_NAME, "port": WORKER_PORT, "targetPort": PORT_NAME, "appProtocol": "http"}],
    }
    return labels.thing(cluster, "v1", "Service", pool.name, labels.selector(cluster, pool), spec=spec)
