"""The pod of a worker runs what the plan starts, listens on all its addresses and is reached at its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launch.plan import ProcessSpec
from launch.render import labels
from launch.render.cluster import SIDE_CHANNEL_PORT, WORKER_PORT, Cluster, RolePool
from launch.render.pods import (
    environment,
    escaped,
    from_field,
    pod_security,
    probe,
    pull,
    resources,
    security,
    spread,
    startup_failures,
    tolerations,
)
from launch.render.tree import Noted, Tree
from orchestrator.wire.info import DEPLOYMENT_ENV

CACHE = "/cache"
PORT_NAME = "http"

_END_MARGIN_S = 15  # from the end of the engine's own time to SIGKILL
_STARTUP_PERIOD_S = 10

# Where vLLM, the hub, compilers and everything else keep files. Some ask for the name of the user, who has
# none in images that are not ours.
_HOME = {
    "USER": "baton",
    "HOME": CACHE,
    "XDG_CACHE_HOME": f"{CACHE}/xdg",
    "HF_HOME": f"{CACHE}/huggingface",
    "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
}


def template(cluster: Cluster, pool: RolePool, *, in_sets: bool) -> dict[str, Tree]:
    """Return the template of the pods that serve requests."""
    return _template(cluster, pool, pool.leader, in_sets=in_sets)


def follower_template(cluster: Cluster, pool: RolePool) -> dict[str, Tree] | None:
    """Return the template of the other pods of an engine; None if it has only one."""
    if pool.follower is None:
        return None
    return _template(cluster, pool, pool.follower, in_sets=True, serves=False)


def _template(
    cluster: Cluster, pool: RolePool, spec: ProcessSpec, *, in_sets: bool, serves: bool = True
) -> dict[str, Tree]:
    annotations: dict[str, Tree] = {"baton/model-name": pool.model.name}
    return {
        "metadata": {"labels": labels.pod(cluster, pool), "annotations": annotations},
        "spec": {
            **pull(cluster),
            "automountServiceAccountToken": Noted(False, "Workers ask Kubernetes for nothing."),
            "enableServiceLinks": False,
            "securityContext": pod_security(),
            **_nodes(cluster, pool),
            "topologySpreadConstraints": spread(labels.selector(cluster, pool), by_revision=not in_sets),
            "terminationGracePeriodSeconds": Noted(
                grace_s(cluster), "A request may take so long, and then the engine until it has ended."
            ),
            "containers": [_container(cluster, pool, spec, serves=serves)],
            "volumes": _volumes(cluster, pool),
        },
    }


def grace_s(cluster: Cluster) -> int:
    return cluster.drain_s + math.ceil(cluster.config.launch.stop_timeout_s) + _END_MARGIN_S


def _nodes(cluster: Cluster, pool: RolePool) -> dict[str, Tree]:
    chosen = cluster.options.worker_pod.node_selector
    resource = cluster.options.gpu_resource if pool.gpus_per_pod else None
    return {
        **({"nodeSelector": dict(chosen)} if chosen else {}),
        "tolerations": tolerations(resource),
    }


def _container(cluster: Cluster, pool: RolePool, spec: ProcessSpec, *, serves: bool) -> dict[str, Tree]:
    adds = (
        ("IPC_LOCK",)
        if any(name.startswith("rdma/") for name in cluster.options.worker_pod.resources)
        else ()
    )
    return {
        "name": "worker",
        "image": cluster.image,
        "imagePullPolicy": cluster.options.pull.policy,
        "command": Noted(
            [escaped(word) for word in spec.argv], "As `baton plan` has it, with the pod's address."
        ),
        "env": [*_env(cluster, spec)],
        "ports": _ports(pool) if serves else [],
        **(_probes(cluster, pool) if serves else {}),
        "resources": _resources(cluster, pool),
        "securityContext": security(adds=adds, is_read_only=pool.pool.engine == "sim"),
        "volumeMounts": _mounts(pool),
    }


def _env(cluster: Cluster, spec: ProcessSpec) -> Iterator[Tree]:
    """Yield the variables; what others refer to comes first."""
    yield Noted(from_field("POD_IP", "status.podIP"), "Other workers fetch KV caches there (NIXL).")
    pod, token = cluster.options.worker_pod, cluster.options.secrets.hf_token
    if not {DEPLOYMENT_ENV} & {*pod.env, *spec.env}:
        field = from_field(DEPLOYMENT_ENV, f"metadata.labels['{labels.REVISION}']")
        yield Noted(field, "Old and new workers are no pair, even if only a flag of them differs.")
    secret = {} if token is None else {"HF_TOKEN": f"{token}/token"}
    yield from environment(cluster, pod, {**_HOME, **pod.env, **spec.env}, secret)


def _ports(pool: RolePool) -> list[Tree]:
    sides = range(SIDE_CHANNEL_PORT, SIDE_CHANNEL_PORT + pool.pool.data_parallel_size)
    events = zip(("kv-events", "kv-replay"), pool.kv_event_ports, strict=False)
    return [
        _port(PORT_NAME, WORKER_PORT),
        *(_port(f"side-{index}", port) for index, port in enumerate(sides)),
        *(_port(name, port) for name, port in events),
    ]


def _port(name: str, number: int) -> Tree:
    return {"name": name, "containerPort": number}


def _probes(cluster: Cluster, pool: RolePool) -> dict[str, Tree]:
    ready = "/health" if pool.is_plain else "/baton/ready"
    failures = startup_failures(cluster, _STARTUP_PERIOD_S)
    startup = probe("/health", PORT_NAME, period=_STARTUP_PERIOD_S, timeout=5, failures=failures)
    readiness = probe(ready, PORT_NAME, period=1, timeout=2, failures=3)
    liveness = probe("/health", PORT_NAME, period=10, timeout=5, failures=6)
    return {
        "startupProbe": Noted(startup, "Until it has loaded the model: launch.start_timeout_s."),
        "readinessProbe": Noted(readiness, "Orchestrators hear within seconds who serves and who drains."),
        "livenessProbe": Noted(
            liveness, "For an engine that is dead for good: a restart loses all KV caches and streams."
        ),
        "lifecycle": {"preStop": _pre_stop(cluster, pool)},
    }


def _pre_stop(cluster: Cluster, pool: RolePool) -> Tree:
    if pool.is_plain:
        why = "vLLM cuts streams when it is told to end, and nobody can ask it how many are left."
        return Noted({"sleep": {"seconds": cluster.drain_s}}, why)
    url = f"http://127.0.0.1:{WORKER_PORT}"
    command = ["baton", "drain", "--self", "--wait", "--url", url, "--timeout-s", str(cluster.drain_s)]
    why = "vLLM cuts streams when it is told to end: so no request is left by then."
    return Noted({"exec": {"command": command}}, why)


def _resources(cluster: Cluster, pool: RolePool) -> dict[str, Tree]:
    gpus = pool.gpus_per_pod
    limits: dict[str, Tree] = {cluster.options.gpu_resource: gpus} if gpus else {}
    cpu, memory = ("100m", "256Mi") if pool.pool.engine == "sim" else ("4", "32Gi") if gpus else ("2", "8Gi")
    return resources(cluster.options.worker_pod, cpu, memory, limits)


def _mounts(pool: RolePool) -> list[Tree]:
    shm: list[Tree] = [] if pool.pool.engine == "sim" else [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    return [{"name": "cache", "mountPath": CACHE}, {"name": "tmp", "mountPath": "/tmp"}, *shm]  # noqa: S108


def _volumes(cluster: Cluster, pool: RolePool) -> list[Tree]:
    memory: dict[str, Tree] = {"medium": "Memory", "sizeLimit": cluster.options.volumes.shm}
    shm: list[Tree] = [
        Noted({"name": "shm", "emptyDir": memory}, "Processes of an engine share memory; 64 MiB by default.")
    ]
    tmp: Tree = {"name": "tmp", "emptyDir": {}}
    return [_cache(cluster, pool), tmp, *([] if pool.pool.engine == "sim" else shm)]


def _cache(cluster: Cluster, pool: RolePool) -> Tree:
    volumes = cluster.options.volumes
    if pool.pool.engine == "sim":
        return {"name": "cache", "emptyDir": {}}
    if volumes.claim is not None:
        return {"name": "cache", "persistentVolumeClaim": {"claimName": volumes.claim}}
    if volumes.host_path is not None:
        host: dict[str, Tree] = {"path": volumes.host_path, "type": "DirectoryOrCreate"}
        return {"name": "cache", "hostPath": host}
    why = "It ends with the pod, whose successor downloads the model again: see `volumes`."
    return Noted({"name": "cache", "emptyDir": {"sizeLimit": volumes.size}}, why)
