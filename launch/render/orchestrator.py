"""Orchestrators are a Deployment: each knows all workers, and none knows of the others."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.access import account
from launch.render.cluster import ADMIN_PORT, CONFIG_FILE, LISTEN_PORT, Cluster
from launch.render.config_map import KEYS_FILE, TLS_CERT, config_name, config_text, graceful_s
from launch.render.names import digest
from launch.render.pods import (
    WARM_UP_S,
    environment,
    escaped,
    pod_security,
    probe,
    pull,
    resources,
    rollout_s,
    security,
    spread,
    tolerations,
)
from launch.render.services import API_PORT_NAME
from launch.render.tree import Noted, Object, Tree, Value, without_none

ADMIN_PORT_NAME = "admin"

_END_MARGIN_S = 15  # from its own limit to SIGKILL


def orchestrators(cluster: Cluster) -> Object:
    own = labels.orchestrators(cluster)
    options = cluster.options
    is_scaled = cluster.max_orchestrators > options.orchestrators
    spec = without_none(
        replicas=None if is_scaled else Value(options.orchestrators, ".Values.orchestrators"),
        minReadySeconds=WARM_UP_S,
        progressDeadlineSeconds=rollout_s(cluster),
        revisionHistoryLimit=3,
        strategy={"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        selector={"matchLabels": own},
        template=_template(cluster, own),
    )
    return labels.thing(cluster, "apps/v1", "Deployment", f"{cluster.name}-orchestrator", own, spec=spec)


def grace_s(cluster: Cluster) -> int:
    return graceful_s(cluster.config.orchestrator) + _END_MARGIN_S


def _template(cluster: Cluster, own: dict[str, str]) -> dict[str, Tree]:
    changes = Noted(digest(config_text(cluster), 16), "A changed config rolls the orchestrators.")
    selected = cluster.options.orchestrator_pod.node_selector
    return {
        "metadata": {"labels": own, "annotations": {"baton/config": changes}},
        "spec": {
            **pull(cluster),
            "serviceAccountName": account(cluster),
            "enableServiceLinks": False,
            "securityContext": pod_security(),
            **({"nodeSelector": dict(selected)} if selected else {}),
            "tolerations": tolerations(),
            "topologySpreadConstraints": spread(own, by_revision=True),
            "terminationGracePeriodSeconds": Noted(
                grace_s(cluster), "orchestrator.timeout_graceful_shutdown, and a margin."
            ),
            "containers": [_container(cluster)],
            "volumes": [*_volumes(cluster)],
        },
    }


def _container(cluster: Cluster) -> dict[str, Tree]:
    pod = cluster.options.orchestrator_pod
    processes = str(cluster.config.orchestrator.processes)
    return {
        "name": "orchestrator",
        "image": cluster.orchestrator_image,
        "imagePullPolicy": cluster.options.pull.policy,
        "command": [escaped(word) for word in cluster.orchestrator.argv],
        "env": environment(cluster, pod, {"HOME": "/tmp", **pod.env}),  # noqa: S108
        "ports": [
            {"name": API_PORT_NAME, "containerPort": LISTEN_PORT},
            {"name": ADMIN_PORT_NAME, "containerPort": ADMIN_PORT},
        ],
        **_probes(cluster),
        "resources": resources(pod, processes, "1Gi", {}),
        "securityContext": security(is_read_only=True),
        "volumeMounts": [*_mounts(cluster)],
    }


def _probes(cluster: Cluster) -> dict[str, Tree]:
    scheme = "HTTPS" if cluster.has_tls else "HTTP"
    # `?any`: where one of several models has no workers, the others are served.
    path = "/ready" if len(cluster.config.models) == 1 else "/ready?any"
    ready = probe(path, API_PORT_NAME, period=1, timeout=2, failures=2, scheme=scheme)
    alive = probe("/health", API_PORT_NAME, period=5, timeout=5, failures=6, scheme=scheme)
    return {
        "readinessProbe": Noted(
            ready, "It knows workers of a model for all that a request needs, and does not end."
        ),
        "livenessProbe": alive,
    }


def _mounts(cluster: Cluster) -> Iterator[Tree]:
    yield {"name": "config", "mountPath": _folder(CONFIG_FILE), "readOnly": True}
    if cluster.api_keys_secret is not None:
        yield {"name": "keys", "mountPath": _folder(KEYS_FILE), "readOnly": True}
    if cluster.has_tls:
        yield {"name": "tls", "mountPath": _folder(TLS_CERT), "readOnly": True}
    yield {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108


def _volumes(cluster: Cluster) -> Iterator[Tree]:
    yield {"name": "config", "configMap": {"name": config_name(cluster)}}
    if cluster.api_keys_secret is not None:
        yield {"name": "keys", "secret": {"secretName": cluster.api_keys_secret}}
    if cluster.has_tls:
        yield {"name": "tls", "secret": {"secretName": cluster.options.secrets.tls}}
    yield {"name": "tmp", "emptyDir": {}}


def _folder(file: str) -> str:
    return file.rpartition("/")[0]
