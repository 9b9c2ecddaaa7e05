"""All our pods have these in common: who they run as, where they run, what they are given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from launch.render.cluster import EXPANDED, Cluster
from launch.render.tree import Noted, Tree, without_none
from orchestrator.config.kubernetes import PodConfig
from orchestrator.wire.info import WORKER_KEY_ENV

USER = 10001  # of the images (Dockerfile)

NODE_LOST_S = 30
WARM_UP_S = 15


def security(*, adds: tuple[str, ...] = (), is_read_only: bool) -> dict[str, Tree]:
    """Return what a container may do: nothing that a server needs not."""
    capabilities: dict[str, Tree] = {"drop": ["ALL"]}
    if adds:
        capabilities["add"] = Noted([*adds], "RDMA pins memory.")
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": capabilities,
        "readOnlyRootFilesystem": is_read_only,
    }


def pod_security() -> dict[str, Tree]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def tolerations(resource: str | None = None) -> Tree:
    """Return what pods tolerate of their nodes; `resource` is what tainted nodes are kept free for."""
    kinds = ("not-ready", "unreachable")
    lost: list[Tree] = [
        {
            "key": f"node.kubernetes.io/{kind}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOST_S,
        }
        for kind in kinds
    ]
    own: list[Tree] = (
        [] if resource is None else [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    )
    return Noted(
        [*own, *lost], f"A pod of a lost node is replaced after {NODE_LOST_S} s, not after 300 as by default."
    )


def spread(labels: Mapping[str, str], *, by_revision: bool) -> Tree:
    """Return how pods are spread over nodes and zones; `by_revision`: those of a rollout by themselves."""
    own: dict[str, Tree] = {"matchLabelKeys": ["pod-template-hash"]} if by_revision else {}
    return Noted(
        [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": dict(labels)},
                **own,
            }
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
        "One lost node or zone takes as few of them along as possible; full nodes are used all the same.",
    )


def escaped(text: str) -> str:
    """Return a text that Kubernetes hands on as it is, except for the variables that are ours."""
    doubled = text.replace("$", "$$")
    for variable in EXPANDED:
        doubled = doubled.replace(f"${variable}", variable)
    return doubled


def from_field(variable: str, path: str) -> Tree:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def environment(
    cluster: Cluster, pod: PodConfig, plain: Mapping[str, str], secret: Mapping[str, str] | None = None
) -> list[Tree]:
    """Return the variables of a container. `secret` says as SECRET/KEY where values are, beside `pod`.

    What others refer to comes first, and no variable is there twice: that of a Secret wins.
    """
    worker_key = cluster.options.secrets.worker_key
    own = {} if worker_key is None else {WORKER_KEY_ENV: f"{worker_key}/key"}
    places = {**own, **(secret or {}), **pod.secret_env}
    rest = {name: value for name, value in plain.items() if name not in places}
    return [*(_from_secret(name, place) for name, place in places.items()), *_variables(rest)]


def _variables(env: Mapping[str, str]) -> Iterator[Tree]:
    for name, value in env.items():
        yield {"name": name, "value": escaped(value)}


def _from_secret(variable: str, place: str) -> Tree:
    secret, _, key = place.partition("/")
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def resources(pod: PodConfig, cpu: str, memory: str, limits: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return what a container asks for, and what it gets at most. `cpu` and `memory` are the defaults."""
    # Without a limit of CPU: a throttled server is slow while cores are idle.
    most = {**limits, **pod.resources, **({} if pod.memory is None else {"memory": pod.memory})}
    asks: dict[str, Tree] = {"cpu": pod.cpu or cpu, "memory": pod.memory or memory, **limits, **pod.resources}
    return {"requests": asks, **({"limits": most} if most else {})}


def probe(
    path: str, port: str, *, period: int, timeout: int, failures: int, scheme: str = "HTTP"
) -> dict[str, Tree]:
    """Return a probe; `period` and `timeout` are in seconds."""
    return {
        "httpGet": {"path": path, "port": port, "scheme": scheme},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def startup_failures(cluster: Cluster, period: int) -> int:
    return max(1, math.ceil(cluster.config.launch.start_timeout_s / period))


def rollout_s(cluster: Cluster) -> int:
    """Return after how many seconds without progress a rollout has failed: no start takes longer."""
    return math.ceil(cluster.config.launch.start_timeout_s) + WARM_UP_S + 60


def pull(cluster: Cluster) -> dict[str, Tree]:
    given = cluster.options.pull.secrets
    return without_none(imagePullSecrets=[{"name": name} for name in given] or None)
