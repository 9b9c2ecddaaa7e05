"""Mistakes in what the config says of Kubernetes are found by `baton check`, before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath

from launch.render.cluster import is_rendered, replicas, span_of
from launch.render.workloads import SET_ROLES
from orchestrator.config.checks import Finding
from orchestrator.config.kubernetes import KubernetesRenderConfig, PodConfig
from orchestrator.config.options import Config, ModelConfig, PoolConfig
from orchestrator.config.printing import is_secret_variable, masked_value, masked_words
from orchestrator.config.yaml12 import Path
from orchestrator.wire.info import WORKER_KEY_ENV

SECTION: Path = ("launch", "kubernetes")

_is_label_value = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?").fullmatch
_SET_BY_US = frozenset({"POD_IP", WORKER_KEY_ENV, "HOME"})


def kubernetes_findings(config: Config) -> Iterator[Finding]:
    """Return what would keep the objects from working; nothing if the config has no such section."""
    options = config.launch.kubernetes
    if options is None:
        return
    yield from _open_to_strangers(config, options)
    yield from _gateway(config, options)
    yield from _volumes(options)
    yield from _autoscale(config, options)
    yield from _workload(config, options)
    yield from _models(config, options)
    yield from _hub_token(options)
    for kind in ("worker_pod", "orchestrator_pod"):
        yield from _pod((*SECTION, kind), getattr(options, kind))
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            found = _pool if is_rendered(pool) else _elsewhere
            yield from found(("models", index, role), pool, options)


def _open_to_strangers(config: Config, options: KubernetesRenderConfig) -> Iterator[Finding]:
    orchestrator = config.orchestrator
    has_keys = orchestrator.api_keys_file is not None or options.secrets.api_keys is not None
    if not has_keys and not orchestrator.insecure_no_auth:
        message = (
            "pods are open to other machines: give orchestrator.api_keys_file, "
            "launch.kubernetes.secrets.api_keys, or orchestrator.insecure_no_auth: true"
        )
        yield Finding(SECTION, message, also=(("orchestrator", "api_keys_file"),))


def _gateway(config: Config, options: KubernetesRenderConfig) -> Iterator[Finding]:
    if options.gateway is not None and config.orchestrator.tls is not None:
        message = (
            "a gateway speaks HTTP with what is behind it: end TLS there, and leave orchestrator.tls out"
        )
        yield Finding((*SECTION, "gateway"), message, also=(("orchestrator", "tls"),))
    if options.gateway is None and options.hostnames:
        yield Finding((*SECTION, "hostnames"), "hostnames has no effect without gateway")


def _volumes(options: KubernetesRenderConfig) -> Iterator[Finding]:
    given = options.volumes.model_fields_set
    if options.volumes.claim is not None and options.volumes.host_path is not None:
        yield Finding((*SECTION, "volumes", "host_path"), "give one of claim and host_path, not both")
    elif "size" in given and given & {"claim", "host_path"}:
        yield Finding((*SECTION, "volumes", "size"), "size has no effect on a claim or a host_path")


def _autoscale(config: Config, options: KubernetesRenderConfig) -> Iterator[Finding]:
    path: Path = (*SECTION, "autoscale")
    scaled = [model for model in config.models if any(_ranges(model))]
    if options.autoscale != "none" and not scaled:
        yield Finding(path, "there is nothing to scale: give a pool replicas: {min: N, max: M}")
    if options.autoscale != "keda" and "prometheus" in options.model_fields_set:
        yield Finding((*SECTION, "prometheus"), "prometheus has no effect without autoscale: keda")
    nameless = [model.name for model in scaled if not _is_label_value(model.name)]
    if options.autoscale == "hpa" and nameless:
        message = (
            f"hpa can ask only for models whose names are labels, which {nameless[0]!r} is not: use keda"
        )
        yield Finding(path, message)


def _ranges(model: ModelConfig) -> Iterator[bool]:
    for _, pool in model.pools():
        yield is_rendered(pool) and replicas(pool)[1] is not None


def _workload(config: Config, options: KubernetesRenderConfig) -> Iterator[Finding]:
    if options.workload == "disaggregatedset" and not any(map(_has_both, config.models)):
        message = "no model has prefill and decode workers that Baton starts: a set has both"
        yield Finding((*SECTION, "workload"), message)


def _has_both(model: ModelConfig) -> bool:
    return {role for role, pool in model.pools() if is_rendered(pool)}.issuperset(SET_ROLES)


def _models(config: Config, options: KubernetesRenderConfig) -> Iterator[Finding]:
    for name in sorted(options.models.keys() - {model.name for model in config.models}):
        yield Finding((*SECTION, "models", name), f"there is no model {name!r}")
    for index, model in enumerate(config.models):
        needed = any(pool.engine == "vllm" and is_rendered(pool) for _, pool in model.pools())
        if needed and model.name not in options.models and FilePath(model.path or "/").is_dir():
            message = (
                f"pods cannot load {model.path}, a folder of this machine: "
                f"launch.kubernetes.models says where they have {model.name!r}"
            )
            yield Finding(("models", index, "path"), message, also=((*SECTION, "models"),))


def _hub_token(options: KubernetesRenderConfig) -> Iterator[Finding]:
    if options.secrets.hf_token is not None and "HF_TOKEN" in options.worker_pod.secret_env:
        yield Finding(
            (*SECTION, "worker_pod", "secret_env", "HF_TOKEN"), "HF_TOKEN is secrets.hf_token already"
        )


def _pod(path: Path, pod: PodConfig) -> Iterator[Finding]:
    yield from _secrets_in((*path, "env"), pod.env)
    for name in sorted(pod.env.keys() & pod.secret_env.keys()):
        yield Finding((*path, "secret_env", name), f"{name} is in env too")
    for key in ("env", "secret_env"):
        for name in sorted(getattr(pod, key).keys() & _SET_BY_US):
            yield Finding((*path, key, name), f"{name} cannot be given here: pods have one already")


def _pool(path: Path, pool: PoolConfig, options: KubernetesRenderConfig) -> Iterator[Finding]:
    if pool.workers is not None:
        yield Finding((*path, "workers"), "pods have no hosts of their own: give replicas for Kubernetes")
        return
    yield from _secrets_in((*path, "env"), pool.env)
    yield from _secret_args((*path, "args"), pool.args)
    for name in sorted(pool.env.keys() & _SET_BY_US - {"HOME"}):
        yield Finding((*path, "env", name), f"{name} cannot be given here: pods have one already")
    for name in sorted(pool.env.keys() & options.worker_pod.secret_env.keys()):
        yield Finding((*path, "env", name), f"{name} is in launch.kubernetes.worker_pod.secret_env too")
    if not options.plugin and pool.engine == "sim":
        yield Finding((*path, "engine"), "the simulated engine is in Baton's image only: plugin must be true")
    yield from _span(path, pool, options)


def _elsewhere(path: Path, pool: PoolConfig, options: KubernetesRenderConfig) -> Iterator[Finding]:
    """Yield what keeps orchestrators in pods from workers that run elsewhere."""
    discover = pool.discover
    if discover is None:
        return
    if discover.file is not None:
        yield Finding(
            (*path, "discover", "file"), "orchestrators in pods have no such file: give urls or dns"
        )
    service = discover.kubernetes
    if service is not None and service.namespace not in (None, options.namespace):
        message = f"orchestrators may read the namespace {options.namespace} only"
        yield Finding(
            (*path, "discover", "kubernetes", "namespace"), message, also=((*SECTION, "namespace"),)
        )


def _span(path: Path, pool: PoolConfig, options: KubernetesRenderConfig) -> Iterator[Finding]:
    size, gpus = span_of(pool, options), pool.gpus_per_replica
    where: Path = (*path, "gpus_per_replica")
    also: tuple[Path, ...] = ((*SECTION, "gpus_per_pod"),)
    if size > 1 and gpus % size:
        yield Finding(where, f"{gpus} GPUs cannot be divided among {size} pods of one size", also=also)
    if size > 1 and pool.data_parallel_size > 1:
        message = f"{gpus} GPUs are {size} pods, and data-parallel engines share one: set gpus_per_pod"
        yield Finding(where, message, also=also)


# --- secrets ----------------------------------------------------------------------------------------

_ELSEWHERE = "name a Secret in launch.kubernetes.worker_pod.secret_env"


def _secrets_in(path: Path, env: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in env.items():
        if value and (is_secret_variable(name) or masked_value(value) != value):
            yield Finding((*path, name), f"{name} holds a secret, which would stand in a file: {_ELSEWHERE}")


def _secret_args(path: Path, args: Sequence[str]) -> Iterator[Finding]:
    for index, (word, shown) in enumerate(zip(args, masked_words(args), strict=True)):
        if word != shown:
            message = f"args[{index}] holds a secret, which would stand in a file: {_ELSEWHERE}"
            yield Finding((*path, index), message)
