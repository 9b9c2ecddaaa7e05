"""NetworkPolicies: pods are reached by whom they serve, and reach what they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from launch.render import labels
from launch.render.cluster import ADMIN_PORT, LISTEN_PORT, WORKER_PORT, Cluster, RolePool
from launch.render.names import slug
from launch.render.tree import Noted, Object, Tree
from orchestrator.config.options import split_address

_DNS, _HTTPS = 53, 443
_API_SERVER = 6443  # where it listens by itself; its Service is at 443


def network_policies(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield them, each with the name of its file."""
    if cluster.options.network_policy:
        yield "network", _of_orchestrators(cluster)
        for model in cluster.config.models:
            pools = cluster.of_model(model)
            if pools:
                yield "network", _of_workers(cluster, pools)


def _of_orchestrators(cluster: Cluster) -> Object:
    ingress: list[Tree] = [
        Noted({"ports": [*_ports([LISTEN_PORT])]}, "Clients, and the gateway."),
        _from_monitoring(cluster, [ADMIN_PORT]),
    ]
    workers = sorted({WORKER_PORT, *(port for pool in cluster.pools for port in pool.kv_event_ports)})
    reached: dict[str, Tree] = {
        "to": [{"podSelector": {"matchLabels": labels.everything(cluster)}}],
        "ports": [*_ports(workers)],
    }
    elsewhere = sorted({_HTTPS, _API_SERVER, *_ports_elsewhere(cluster)})
    why = "The API server has no label (EndpointSlices), nor have workers and collectors elsewhere."
    egress: list[Tree] = [_dns(), reached, Noted({"ports": [*_ports(elsewhere)]}, why)]
    own = labels.orchestrators(cluster)
    return _policy(cluster, f"{cluster.name}-orchestrator", own, ingress, egress)


def _ports_elsewhere(cluster: Cluster) -> Iterator[int]:
    """Yield the ports of what the config names by URLs."""
    tracing = cluster.config.orchestrator.tracing
    urls = [url for model in cluster.config.models for _, pool in model.pools() for url in pool.urls or ()]
    yield from _discovered_ports(cluster)
    for url in [*urls, *([] if tracing is None else [tracing.endpoint])]:
        parts = urlsplit(url)
        yield parts.port or (_HTTPS if parts.scheme == "https" else 80)


def _discovered_ports(cluster: Cluster) -> Iterator[int]:
    """Yield the ports of workers that are discovered and are none of our pods."""
    ours = {(pool.model.name, pool.role) for pool in cluster.pools}
    for model in cluster.config.models:
        for role, pool in model.pools():
            if pool.discover is not None and (model.name, role) not in ours:
                service = pool.discover.kubernetes
                if pool.discover.dns is not None:
                    yield split_address(pool.discover.dns)[1]
                elif service is not None and isinstance(service.port, int):
                    yield service.port


def _of_workers(cluster: Cluster, pools: tuple[RolePool, ...]) -> Object:
    own = labels.model(cluster, pools[0])
    served = [WORKER_PORT, *sorted({port for pool in pools for port in pool.kv_event_ports})]
    orchestrators: dict[str, Tree] = {
        "from": [{"podSelector": {"matchLabels": labels.orchestrators(cluster)}}],
        "ports": [*_ports(served)],
    }
    peers: list[Tree] = [{"podSelector": {"matchLabels": own}}]
    why = "KV caches: NIXL asks at the side channel and sends on ports of its own choice."
    ingress: list[Tree] = [
        orchestrators,
        _from_monitoring(cluster, [WORKER_PORT]),
        Noted({"from": peers}, why),
    ]
    egress: list[Tree] = [_dns(), {"to": peers}]
    if _downloads(pools):
        egress.append(Noted({"ports": [*_ports([_HTTPS])]}, "The hub, for models that are no folder."))
    name = f"{cluster.name}-{slug(pools[0].model.name)}-workers"
    return _policy(cluster, name, own, ingress, egress)


def _downloads(pools: Iterable[RolePool]) -> bool:
    return any(pool.pool.engine == "vllm" and not (pool.model.path or "").startswith("/") for pool in pools)


def _from_monitoring(cluster: Cluster, ports: Iterable[int]) -> Tree:
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": cluster.options.monitoring_namespace}}
    return Noted({"from": [{"namespaceSelector": namespace}], "ports": [*_ports(ports)]}, "Metrics.")


def _dns() -> Tree:
    return Noted({"ports": [*_ports([_DNS], "UDP"), *_ports([_DNS])]}, "Names.")


def _ports(numbers: Iterable[int], protocol: str = "TCP") -> Iterator[Tree]:
    for number in numbers:
        yield {"port": number, "protocol": protocol}


def _policy(
    cluster: Cluster, name: str, own: Mapping[str, str], ingress: list[Tree], egress: list[Tree]
) -> Object:
    spec: dict[str, Tree] = {
        "podSelector": {"matchLabels": dict(own)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return labels.thing(cluster, "networking.k8s.io/v1", "NetworkPolicy", name, dict(own), spec=spec)
