"""These checks see what no value tells by itself: how values fit each other, and whether files are there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path as FilePath
from ssl import PROTOCOL_TLS_SERVER, SSLContext, SSLError
from typing import Final, get_args
from urllib.parse import urlsplit

from orchestrator.config.addresses import (
    REPLICA_PORTS,
    OwnListener,
    is_loopback,
    machine,
    own_listeners,
    worker_addresses,
)
from orchestrator.config.files import read_file
from orchestrator.config.keys import KeyFileError, KeyRing
from orchestrator.config.options import (
    MAX_PORT,
    MAX_WORKERS,
    WILDCARDS,
    Config,
    ModelConfig,
    OrchestratorConfig,
    PoolConfig,
    TlsConfig,
    WorkerConfig,
    split_address,
)
from orchestrator.config.policies import PolicyConfig
from orchestrator.config.yaml12 import Path
from orchestrator.form import FORM_ENV, WISHES
from orchestrator.wire.info import (
    MOST_NIXL_DELAY_US,
    NIXL_DELAY_ENV,
    STREAMS,
    STREAMS_ENV,
    TRANSPORT_ENV,
    Encoding,
    Role,
)

# The plan sets these for each worker; a second value would contradict the first without a word.
RESERVED_ARGS = {
    "--host": "set workers: [{host: ...}]",
    "--port": "set workers: [{port: ...}]",
    "--model": "set the model's path",
    "--served-model-name": "set served_model",
}
RESERVED_CONNECTOR = {"--kv-transfer-config": "the role decides it"}
SECRET_ARGS = {
    "--api-key": "every user of the machine can read it there: set BATON_WORKER_API_KEY in the environment",
    "--hf-token": "every user of the machine can read it there: set HF_TOKEN in the environment",
}
RESERVED_ENV = {
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "set workers: [{host: ...}]",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "set workers: [{side_channel_port: ...}]",
    "BATON_ROLE": "the pool decides it",
    "BATON_MODEL": "the model's name decides it",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "clients choose ids, and several may choose the same",
}


def environment_fault(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name of a variable that says what it cannot, and what is wrong; None if all is well.

    Workers and orchestrator find out only when they start.
    """
    form = environ.get(FORM_ENV)
    if form and form not in WISHES:
        return FORM_ENV, f"must be one of {', '.join(WISHES)}, not {form!r}"
    streams = environ.get(STREAMS_ENV)
    if streams and streams not in STREAMS:
        return STREAMS_ENV, f"must be one of {', '.join(STREAMS)}, not {streams!r}"
    transport, delay = environ.get(TRANSPORT_ENV), environ.get(NIXL_DELAY_ENV, "").strip()
    if transport and transport not in get_args(Encoding):
        return TRANSPORT_ENV, f"must be one of {', '.join(get_args(Encoding))}, not {transport!r}"
    is_number = delay.isascii() and delay.isdigit() and len(delay) < 10
    if delay and not (is_number and int(delay) <= MOST_NIXL_DELAY_US):
        return NIXL_DELAY_ENV, f"must be a number from 0 to {MOST_NIXL_DELAY_US}, not {delay!r}"
    return None


_TRACING_MODULE: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding is one mistake. `path` is where to look, or what is absent there.

    A finding means nothing if a value beside `path`, or beside one of `also`, is already refused.
    """

    path: Path
    message: str
    also: tuple[Path, ...] = ()
    follows_from: tuple[Path, ...] | None = None  # if given, only what is refused there makes it void


def findings(config: Config) -> Iterator[Finding]:
    """Return all mistakes in no order. This looks at the file system, at nothing else outside the config."""
    yield from _open_to_strangers(config)
    yield from _drain(config.orchestrator)
    yield from _cors(config.orchestrator)
    yield from _kv_events(config)
    yield from _tracing(config.orchestrator)
    yield from _ranks(config)
    yield from _slurm(config)
    yield from _files(config)
    yield from _model_names(config)
    for index, model in enumerate(config.models):
        yield from _pools(("models", index), model)
    yield from _scaling(config)
    count = sum(_most(pool) for model in config.models for _, pool in model.pools())
    if count > MAX_WORKERS:
        yield Finding(("models",), f"there are {count} workers in all, at most {MAX_WORKERS} are possible")
    else:
        yield from _addresses(config)


def _slurm(config: Config) -> Iterator[Finding]:
    there = {f"{model.name}/{role}" for model in config.models for role, _ in model.pools()}
    seen: set[str] = set()
    for index, own in enumerate(config.launch.slurm.pools):
        path = ("launch", "slurm", "pools", index, "pool")
        if own.pool not in there:
            yield Finding(path, f"there is no pool {own.pool!r}; there is {', '.join(sorted(there))}")
        elif own.pool in seen:
            yield Finding(path, f"{own.pool} has values of its own already")
        seen.add(own.pool)


def _most(pool: PoolConfig) -> int:
    """Count the workers that a pool may have; nobody knows how many will be discovered."""
    if not pool.is_managed and pool.urls is None:
        return 0
    return pool.count if pool.range is None else pool.range.max


# --- how many workers -------------------------------------------------------------------------------


def _scaling(config: Config) -> Iterator[Finding]:
    scaling = config.scaling
    if scaling is None:
        yield from _ranges_without_scaling(config)
        return
    if scaling.up_after_s > scaling.down_after_s:
        path: Path = ("scaling", "down_after_s")
        message = "down_after_s is shorter than up_after_s: workers would go before they are needed"
        yield Finding(path, message, also=(("scaling", "up_after_s"),))
    least = sum(pool.count * pool.gpus_per_replica for model in config.models for _, pool in model.pools())
    if scaling.max_gpus is not None and scaling.max_gpus < least:
        message = f"max_gpus is {scaling.max_gpus}, and the fewest workers of all pools have {least} GPUs"
        yield Finding(("scaling", "max_gpus"), message, also=(("models",),))


def _ranges_without_scaling(config: Config) -> Iterator[Finding]:
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            if pool.range is not None:
                message = "nobody chooses between min and max: give a number, or a section `scaling`"
                yield Finding(("models", index, role, "replicas"), message, also=(("scaling",),))


# --- the orchestrator -------------------------------------------------------------------------------


def _kv_events(config: Config) -> Iterator[Finding]:
    if find_spec("zmq") is None:
        for role in ("prefill", "decode"):
            policy: PolicyConfig = getattr(config.routing, role)
            if policy.hears_caches:
                message = f"{policy.policy} needs the package pyzmq: pip install 'baton-serve[kv-events]'"
                yield Finding(("routing", role), message)


def _tracing(orchestrator: OrchestratorConfig) -> Iterator[Finding]:
    if orchestrator.tracing is not None and not _is_there(_TRACING_MODULE):
        message = "tracing needs OpenTelemetry's SDK: pip install 'baton-serve[otel]'"
        yield Finding(("orchestrator", "tracing"), message)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


def _open_to_strangers(config: Config) -> Iterator[Finding]:
    orchestrator = config.orchestrator
    if orchestrator.api_keys_file is not None or orchestrator.insecure_no_auth:
        return
    for key, address in (("listen", orchestrator.listen), ("admin", orchestrator.admin)):
        if address is not None and not is_loopback(split_address(address)[0]):
            message = f"{address} is open to other machines: give api_keys_file, or insecure_no_auth: true"
            yield Finding(("orchestrator", key), message)


def _drain(orchestrator: OrchestratorConfig) -> Iterator[Finding]:
    path: Path = ("orchestrator", "drain_notice_s")
    limit: Path = ("orchestrator", "timeout_graceful_shutdown")
    if orchestrator.drain_notice_s > orchestrator.timeout_graceful_shutdown:
        yield Finding(path, "drain_notice_s is longer than timeout_graceful_shutdown", also=(limit,))


def _cors(orchestrator: OrchestratorConfig) -> Iterator[Finding]:
    cors = orchestrator.cors
    if cors is not None and cors.allow_credentials and "*" in cors.allowed_origins:
        path: Path = ("orchestrator", "cors", "allow_credentials")
        message = "with allow_credentials every page could act as its reader: name the allowed_origins"
        yield Finding(path, message, also=(("orchestrator", "cors", "allowed_origins"),))


def _ranks(config: Config) -> Iterator[Finding]:
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            path: Path = ("models", index, role, "data_parallel_size")
            size, gpus = pool.data_parallel_size, pool.gpus_per_replica
            if size > 1 and config.orchestrator.relay_data_parallel_rank:
                message = "with relay_data_parallel_rank clients choose the rank: give one or the other"
                yield Finding(path, message, also=(("orchestrator", "relay_data_parallel_rank"),))
            if pool.is_managed and pool.engine == "vllm" and pool.device == "cuda" and gpus % size:
                message = f"{gpus} GPUs cannot be divided among {size} engines: set gpus_per_replica"
                yield Finding(path, message, also=((*path[:-1], "gpus_per_replica"),))


def _files(config: Config) -> Iterator[Finding]:
    orchestrator = config.orchestrator
    if orchestrator.api_keys_file is not None:
        yield from _key_file(("orchestrator", "api_keys_file"), orchestrator.api_keys_file)
    if orchestrator.tls is not None:
        yield from _key_pair(("orchestrator", "tls"), orchestrator.tls)
    decisions = orchestrator.log.decisions
    if decisions is not None and FilePath(decisions).is_dir():
        path = ("orchestrator", "log", "decisions")
        yield Finding(path, f"{decisions} is a folder: name a file")
    if decisions is not None and not (folder := FilePath(decisions).parent).is_dir():
        path = ("orchestrator", "log", "decisions")
        yield Finding(path, f"there is no directory {folder}", follows_from=())


def _key_file(path: Path, name: str) -> Iterator[Finding]:
    unreadable = list(_readable(path, name))
    yield from unreadable
    if not unreadable:
        try:
            KeyRing.load(name)
        except KeyFileError as error:
            yield from (Finding(path, problem, follows_from=()) for problem in error.problems)


def _key_pair(path: Path, tls: TlsConfig) -> Iterator[Finding]:
    unreadable = [*_readable((*path, "cert"), tls.cert), *_readable((*path, "key"), tls.key)]
    yield from unreadable
    if not unreadable:
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            SSLContext(PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert, tls.key, password=lambda: "")
        except SSLError as error:
            why = error.reason or re.sub(r" \(_ssl\.c:\d+\)$", "", str(error))
            message = f"{tls.cert} and {tls.key} are no certificate and its unencrypted key: {why}"
            yield Finding(path, message, follows_from=())


def _readable(path: Path, name: str) -> Iterator[Finding]:
    try:
        read_file(name)
    except OSError as error:
        yield Finding(path, f"cannot read {name}: {error.strerror}", follows_from=())


# --- models and pools -------------------------------------------------------------------------------


def _model_names(config: Config) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for index, model in enumerate(config.models):
        earlier = first.setdefault(model.name, index)
        if earlier != index:
            yield Finding(("models", index, "name"), f"models.{earlier} has the name {model.name!r} too")
    yield from _other_names(config, taken={name: f"models.{index}" for name, index in first.items()})


def _other_names(config: Config, taken: dict[str, str]) -> Iterator[Finding]:
    """Yield what is wrong with adapters and aliases; `taken` has the names of models, and who has them."""
    for index, model in enumerate(config.models):
        for place, name in enumerate(model.adapters):
            if name in taken:
                path: Path = ("models", index, "adapters", place)
                yield Finding(path, f"{taken[name]} has the name {name!r} too")
            taken.setdefault(name, f"models.{index}.adapters.{place}")
    for alias, target in config.aliases.items():
        if alias in taken:
            yield Finding(("aliases", alias), f"{taken[alias]} has the name {alias!r} too")
        if target not in taken:
            message = f"there is no model or adapter {target!r}; there is: {', '.join(taken)}"
            yield Finding(("aliases", alias), message)


def _pools(path: Path, model: ModelConfig) -> Iterator[Finding]:
    yield from _roles(path, model)
    yield from _engines(path, model)
    yield from _model_path(path, model)
    for role, pool in model.pools():
        yield from _useless(path, role, pool)
        yield from _overridden((*path, role), role, pool)
        for index, worker in enumerate(pool.workers or ()):
            yield from _overridden((*path, role, "workers", index), role, worker)
            yield from _useless_gpus((*path, role, "workers", index), pool, worker)


def _roles(path: Path, model: ModelConfig) -> Iterator[Finding]:
    if (model.prefill is None) != (model.decode is None):
        given, absent = ("prefill", "decode") if model.decode is None else ("decode", "prefill")
        yield Finding((*path, given), f"{model.name!r} has {given} workers and no {absent} workers")
    elif model.prefill is None and model.both is None:
        yield Finding((*path, "prefill"), f"{model.name!r} has no workers: give prefill and decode, or both")


def _engines(path: Path, model: ModelConfig) -> Iterator[Finding]:
    pair = (model.prefill, model.decode)
    if any(pool is None or not pool.is_managed for pool in pair):
        return
    prefill, decode = (pool.engine for pool in pair if pool is not None)
    if prefill != decode:
        message = (
            f"prefill is {prefill}, so decode must be {prefill} too: engines hand over only to their like"
        )
        yield Finding((*path, "decode", "engine"), message, also=((*path, "prefill", "engine"),))


def _model_path(path: Path, model: ModelConfig) -> Iterator[Finding]:
    managed = {role: pool for role, pool in model.pools() if pool.is_managed and pool.engine == "vllm"}
    if not managed:
        return
    if model.path is None:
        message = f"{model.name!r} has no path: vLLM needs a directory or a hub name to start from"
        yield Finding((*path, "path"), message, also=tuple((*path, role, "engine") for role in managed))
    elif (
        _is_needed_here(managed.values())
        and not is_hub_name(model.path)
        and not FilePath(model.path).exists()
    ):
        follows_from = tuple((*path, role) for role in managed)
        yield Finding((*path, "path"), f"no such directory: {model.path}", follows_from=follows_from)


def _is_needed_here(pools: Iterable[PoolConfig]) -> bool:
    """Return whether workers of this machine load the model; those that are discovered are elsewhere."""
    here = [pool for pool in pools if pool.discover is None]
    return any(is_loopback(worker.host) for pool in here for worker in pool.workers or [WorkerConfig()])


def is_hub_name(path: str) -> bool:
    """Return whether a path that is not there may be meant as ORG/NAME."""
    return path.count("/") == 1 and path[0].isalnum() and not path.endswith("/")


def _useless(path: Path, role: Role, pool: PoolConfig) -> Iterator[Finding]:
    given = pool.model_fields_set
    if role == "prefill" and "seats" in given:
        yield Finding((*path, role, "seats"), "seats has no effect on prefill workers: give it to decode")
    if pool.urls is not None:
        for key in sorted(given - {"urls", "served_model", "seats", "data_parallel_size", "zone", "zones"}):
            yield Finding(
                (*path, role, key), f"{key} has no effect on urls: Baton does not start these workers"
            )
    elif not pool.is_managed:
        return  # a launcher elsewhere may start what is discovered, from the same file
    elif pool.engine == "sim":
        for key in sorted(given & {"device", "gpus_per_replica"}):
            yield Finding((*path, role, key), f"{key} has no effect on the simulated engine")
    elif "sim" in given:
        yield Finding((*path, role, "sim"), "sim has no effect without engine: sim")


def _useless_gpus(path: Path, pool: PoolConfig, worker: WorkerConfig) -> Iterator[Finding]:
    if worker.gpus is not None and (pool.engine == "sim" or pool.device == "cpu"):
        why = "the simulated engine" if pool.engine == "sim" else "device: cpu"
        yield Finding((*path, "gpus"), f"gpus has no effect on {why}")


def _overridden(path: Path, role: Role, settings: PoolConfig | WorkerConfig) -> Iterator[Finding]:
    reserved = RESERVED_ARGS if role == "both" else RESERVED_ARGS | RESERVED_CONNECTOR
    for index, arg in enumerate(settings.args):
        option = arg.split("=", 1)[0].replace("_", "-")
        if option in reserved:
            yield Finding((*path, "args", index), f"{option} cannot be given here: {reserved[option]}")
        elif option in SECRET_ARGS:
            yield Finding((*path, "args", index), f"{option} cannot be given here: {SECRET_ARGS[option]}")
    for name in settings.env.keys() & RESERVED_ENV.keys():
        yield Finding((*path, "env", name), f"{name} cannot be given here: {RESERVED_ENV[name]}")
    fault = environment_fault(settings.env)
    if fault is not None:
        yield Finding((*path, "env", fault[0]), " ".join(fault))


# --- who listens where ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Listener:
    path: Path
    host: str
    port: int
    owner: str  # workers that Baton never starts may serve several models, so only their own counts

    def excludes(self, other: _Listener) -> bool:
        hosts = {self.host, other.host}
        return bool(hosts & WILDCARDS) or len({machine(host) for host in hosts}) == 1


def _addresses(config: Config) -> Iterator[Finding]:
    yield from _too_few_ports(config)
    by_port: dict[int, list[_Listener]] = defaultdict(list)
    for listener in (*_own(config), *_given(config)):
        for earlier in by_port[listener.port]:
            is_shared_url = earlier.owner != listener.owner and "" not in (earlier.owner, listener.owner)
            if listener.excludes(earlier) and not is_shared_url:
                message = f"{listener.host} port {listener.port} is taken by {dotted(earlier.path)}"
                if "launch" in (listener.path[0], earlier.path[0]):
                    message += f": orchestrators are {REPLICA_PORTS} ports apart"
                yield Finding(listener.path, message, also=(earlier.path,))
                break
        by_port[listener.port].append(listener)
    try:
        worker_addresses(config)
    except ValueError as error:
        yield Finding(("base_port",), str(error))


def _own(config: Config) -> Iterator[_Listener]:
    for own in own_listeners(config):
        if 0 < own.port <= MAX_PORT:
            yield _Listener(_place_of(own), own.host, own.port, owner="")


def _place_of(own: OwnListener) -> Path:
    """Return the option that has an orchestrator listen there."""
    return ("launch", "orchestrators") if own.replica else ("orchestrator", own.option)


def _too_few_ports(config: Config) -> Iterator[Finding]:
    for own in own_listeners(config):
        if own.port > MAX_PORT:
            message = (
                f"orchestrator {own.replica + 1} of {config.launch.orchestrators} would listen at port "
                f"{own.port}, and ports end at {MAX_PORT}: lower orchestrator.{own.option}"
            )
            yield Finding(_place_of(own), message)
            return


def _given(config: Config) -> Iterator[_Listener]:
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            path: Path = ("models", index, role)
            for place, url in enumerate(pool.urls or ()):
                yield _Listener(
                    (*path, "urls", place), *split_address(urlsplit(url).netloc), owner=model.name
                )
            for place, worker in enumerate(pool.workers or ()):
                for key, count in (("port", 1), ("side_channel_port", pool.data_parallel_size)):
                    port = getattr(worker, key)
                    if port is not None:
                        where: Path = (*path, "workers", place, key)
                        for one in range(port, port + count):
                            yield _Listener(where, worker.host, one, owner="")


def dotted(path: Path) -> str:
    """Return a path as `--set` takes it, for instance `models.0.prefill`."""
    return ".".join(str(key) for key in path)
