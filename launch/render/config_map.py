"""The orchestrators' config is the user's, with the pools that became pods found by their Services."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launch.render import labels
from launch.render.cluster import ADMIN_PORT, CONFIG_FILE, LISTEN_PORT, Cluster, RolePool
from launch.render.text import document, scalar
from launch.render.tree import Noted, Object, Tree
from launch.render.worker_pod import PORT_NAME
from orchestrator.config.options import ModelConfig, OrchestratorConfig

FILE = CONFIG_FILE.rpartition("/")[2]
KEYS_FILE = "/etc/baton/keys/keys"
TLS_CERT, TLS_KEY = "/etc/baton/tls/tls.crt", "/etc/baton/tls/tls.key"

# Longer than any balancer takes to hear that a pod is not ready any more.
LEAST_NOTICE_S = 5.0

# What orchestrators need to know of workers that they do not start, and of those that they scale besides.
_KEPT = ("served_model", "data_parallel_size", "zone")
_KEPT_OF_SCALED = ("engine", "device", "gpus_per_replica")
# What is about this machine, and starting workers on it.
_LOCAL = frozenset({"launch", "base_port"})


def config_map(cluster: Cluster) -> Object:
    own = labels.orchestrators(cluster)
    return labels.thing(
        cluster, "v1", "ConfigMap", config_name(cluster), own, data={FILE: config_text(cluster)}
    )


def config_name(cluster: Cluster) -> str:
    return f"{cluster.name}-config"


def config_text(cluster: Cluster) -> str:
    """Return the file that orchestrators read."""
    dumped = cluster.config.model_dump(exclude_unset=True, serialize_as_any=True)
    kept = {key: value for key, value in dumped.items() if key not in _LOCAL}
    tree = kept | {
        "orchestrator": _orchestrator(cluster, kept.get("orchestrator", {})),
        "models": [
            _model(cluster, model, seen)
            for model, seen in zip(cluster.config.models, kept["models"], strict=True)
        ],
        "routing": _routing(kept.get("routing", {})),
    }
    return document([tree], scalar)


def graceful_s(orchestrator: OrchestratorConfig) -> int:
    """Return how long open requests may take when an orchestrator ends, in seconds.

    Without a wish of the user's it is as long as any request may take: a rollout cuts none.
    """
    if "timeout_graceful_shutdown" in orchestrator.model_fields_set:
        return orchestrator.timeout_graceful_shutdown
    return max(orchestrator.timeout_graceful_shutdown, math.ceil(orchestrator.limits.request_timeout_s))


def notice_s(orchestrator: OrchestratorConfig) -> float:
    """Return how long an orchestrator that ends serves on while it is not ready any more, in seconds."""
    return min(max(orchestrator.drain_notice_s, LEAST_NOTICE_S), graceful_s(orchestrator))


def _orchestrator(cluster: Cluster, given: Mapping[str, Any]) -> dict[str, Tree]:
    options = cluster.config.orchestrator
    made: dict[str, Tree] = {
        **given,
        "listen": f"0.0.0.0:{LISTEN_PORT}",
        "admin": f"0.0.0.0:{ADMIN_PORT}",
        "drain_notice_s": Noted(notice_s(options), "Load balancers turn away before requests are refused."),
        "timeout_graceful_shutdown": graceful_s(options),
    }
    if cluster.api_keys_secret is not None:
        made["api_keys_file"] = KEYS_FILE
    if cluster.has_tls:
        made["tls"] = {"cert": TLS_CERT, "key": TLS_KEY}
    if options.allowed_hosts:
        made["allowed_hosts"] = [*dict.fromkeys([*options.allowed_hosts, *_service_hosts(cluster)])]
    if "log" in given:
        made["log"] = {key: value for key, value in given["log"].items() if key != "decisions"}
    return made


def _service_hosts(cluster: Cluster) -> list[str]:
    service = f"{cluster.name}.{cluster.options.namespace}"
    return [cluster.name, service, f"{service}.svc", f"{service}.svc.cluster.local"]


def _model(cluster: Cluster, model: ModelConfig, given: Mapping[str, Any]) -> dict[str, Tree]:
    ours = {pool.role: pool for pool in cluster.of_model(model)}
    scaled = [pool for pool in ours.values() if pool.most is not None]
    path = scaled[0].model.path if scaled else None
    made: dict[str, Tree] = {
        key: _pool(ours[key], value) if key in ours else value
        for key, value in given.items()
        if key != "path"
    }
    return made if path is None else {"name": model.name, "path": path, **made}


def _pool(pool: RolePool, given: Mapping[str, Any]) -> dict[str, Tree]:
    found: dict[str, Tree] = {"discover": {"kubernetes": {"service": pool.name, "port": PORT_NAME}}}
    kept = _KEPT if pool.most is None else (*_KEPT_OF_SCALED, *_KEPT)
    known = pool.role != "prefill" and pool.pool.seats != type(pool.pool).model_fields["seats"].default
    return {
        **found,
        **({} if pool.most is None else {"replicas": {"min": pool.least, "max": pool.most}}),
        **{key: given[key] for key in kept if given.get(key) is not None},
        **({"seats": pool.pool.seats} if known else {}),
    }


def _routing(given: Mapping[str, Any]) -> dict[str, Tree]:
    """Return the section with pairs of one revision: in a rollout there are two."""
    if "pair" in given:
        return dict(given)
    return {
        **given,
        "pair": Noted("same_revision", "In a rollout old and new workers serve beside each other."),
    }
