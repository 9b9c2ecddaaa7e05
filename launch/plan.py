"""A plan says which processes the config puts on this machine, and how each is started.

It is made without a look at the machine: `up`, `up --dry-run`, `plan` and `worker` all take it from here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict
from urllib.parse import quote

from launch.engines import ENGINES
from launch.engines.base import PlanError, Span, Surroundings, Worker
from orchestrator.config.addresses import (
    REPLICA_PORTS,
    WorkerAddress,
    WorkerPlace,
    machine,
    own_listeners,
    worker_addresses,
    worker_places,
)
from orchestrator.config.options import WILDCARDS, Config, join_address, split_address
from orchestrator.config.printing import is_secret_variable
from orchestrator.interpreter import PATH_ENV
from orchestrator.wire.info import Role


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """This starts a process, in a session of its own, in the working directory of whoever starts it."""

    name: str  # MODEL/ROLE/INDEX, or "orchestrator"
    role: Role | Literal["orchestrator", "build"]
    argv: tuple[str, ...]  # empty if a backend finds out where it runs, and how
    env: Mapping[str, str]  # on top of the inherited environment
    ready_url: str  # answers 200 once the process is up
    listens: tuple[tuple[str, int], ...]  # (host, port): must be free before the start
    log_name: str
    gpus: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """Return where the process answers."""
        return self.ready_url.removesuffix("/health")

    @property
    def secret_env(self) -> frozenset[str]:
        """Name those in `env` whose values must not be shown."""
        return frozenset(filter(is_secret_variable, self.env))


@dataclass(frozen=True, slots=True)
class Plan:
    """`up` starts all of this on the machine that it runs on."""

    workers: tuple[ProcessSpec, ...]
    orchestrator: ProcessSpec
    elsewhere: tuple[str, ...]  # workers of other machines
    url: str  # where clients reach the data plane from this machine
    admins: tuple[str, ...] = ()  # where operators reach the admin listeners of all orchestrators
    replicas: tuple[ProcessSpec, ...] = ()  # further orchestrators, which know nothing of each other
    discovered: tuple[str, ...] = ()  # pools whose workers the orchestrators find, each with its source
    build: ProcessSpec | None = None  # builds the orchestrator's compiled form meanwhile, and ends
    backend: str = "local"  # places the workers

    @property
    def processes(self) -> tuple[ProcessSpec, ...]:
        """Return all of them in the order of their start."""
        return (*self.workers, *self.orchestrators)

    @property
    def orchestrators(self) -> tuple[ProcessSpec, ...]:
        return (self.orchestrator, *self.replicas)

    @property
    def here(self) -> tuple[ProcessSpec, ...]:
        """Return those that run on this machine."""
        return tuple(spec for spec in self.processes if spec.argv)


def make_plan(config: Config, config_path: str, overrides: Sequence[str], around: Surroundings) -> Plan:
    """Return everything that the file puts on this machine, or has a backend place. Raises `PlanError`."""
    if split_address(config.orchestrator.listen)[1] == 0:
        raise PlanError("orchestrator.listen has port 0: give a port, so that others can be told of it")
    if config.launch.backend != "local":
        return _placed_plan(config, config_path, overrides, around)
    managed = [address for address in worker_addresses(config) if address.is_managed]
    here = [address.name for address in managed if around.is_here(address.host)]
    return Plan(
        workers=tuple(worker_specs(config, around, only=here).values()),
        elsewhere=tuple(address.name for address in managed if address.name not in here),
        **_front(config, config_path, overrides, around),
        discovered=tuple(_discovered(config)),
    )


def _placed_plan(config: Config, config_path: str, overrides: Sequence[str], around: Surroundings) -> Plan:
    """Return a plan whose workers have names only: what else they need is found out where they run."""
    places = [place for place in worker_places(config) if place.url is None]
    for place in places:
        _check_placed(place, config.launch.backend)
    return Plan(
        workers=tuple(placed_spec(place.name, place.role) for place in places),
        elsewhere=(),
        **_front(config, config_path, overrides, around),
        discovered=tuple(_discovered(config)),
        backend=config.launch.backend,
    )


def _check_placed(place: WorkerPlace, backend: str) -> None:
    if place.pool.workers is not None:
        raise PlanError(
            f"{place.model.name}/{place.role} names hosts of its workers, but {backend} chooses where they "
            "run: give replicas in place of workers"
        )


def placed_spec(name: str, role: Role) -> ProcessSpec:
    """Return what is known beforehand of a worker that a backend places: not where it runs, nor how."""
    return ProcessSpec(
        name=name, role=role, argv=(), env={}, ready_url="", listens=(), log_name=log_name(name)
    )


def _discovered(config: Config) -> Iterator[str]:
    for model in config.models:
        for role, pool in model.pools():
            if pool.discover is not None:
                yield f"{model.name}/{role} by {pool.discover.name}"


def worker_specs(
    config: Config, around: Surroundings, only: Sequence[str] | None = None
) -> Mapping[str, ProcessSpec]:
    """Return the managed workers by name, all or those in `only`. Raises `PlanError`."""
    pairs = list(zip(worker_places(config), worker_addresses(config), strict=True))
    gpus = _allot_gpus([place for place, address in pairs if address.is_managed])
    return {
        address.name: worker_process(config, place, address, gpus.get(address.name, ()), around)
        for place, address in pairs
        if address.is_managed and (only is None or address.name in only)
    }


def public_url(config: Config, replica: int = 0) -> str:
    """Return where clients reach an orchestrator from this machine."""
    host, port = split_address(config.orchestrator.listen)
    return f"{_scheme(config)}://{join_address(_reachable(host), port + replica * REPLICA_PORTS)}"


def _scheme(config: Config) -> str:
    """Return what both listeners speak."""
    return "http" if config.orchestrator.tls is None else "https"


def admin_url(config: Config, replica: int = 0) -> str | None:
    """Return where the admin listener is reached from this machine; None if nobody can know."""
    if config.orchestrator.admin is None:
        return None
    host, port = split_address(config.orchestrator.admin)
    if not port:
        return None
    return f"{_scheme(config)}://{join_address(_reachable(host), port + replica * REPLICA_PORTS)}"


def _reachable(host: str) -> str:
    if host not in WILDCARDS:
        return host
    return "::1" if ":" in host else "127.0.0.1"


# --- orchestrators ----------------------------------------------------------------------------------


class _Front(TypedDict):
    """These parts of a plan are of the orchestrators."""

    orchestrator: ProcessSpec
    replicas: tuple[ProcessSpec, ...]
    url: str
    admins: tuple[str, ...]


def _front(config: Config, config_path: str, overrides: Sequence[str], around: Surroundings) -> _Front:
    """Return what is planned of the orchestrators. Raises `PlanError`."""
    count = config.launch.orchestrators
    if count > 1 and config.orchestrator.admin is not None and admin_url(config) is None:
        raise PlanError("orchestrator.admin has port 0, and several orchestrators are started: give a port")
    specs = [orchestrator_process(config, config_path, overrides, around, index) for index in range(count)]
    admins = [admin_url(config, replica) for replica in range(count)]
    return {
        "orchestrator": specs[0],
        "replicas": tuple(specs[1:]),
        "url": public_url(config),
        "admins": tuple(url for url in admins if url is not None),
    }


def orchestrator_process(
    config: Config, config_path: str, overrides: Sequence[str], around: Surroundings, replica: int = 0
) -> ProcessSpec:
    """Return what starts an orchestrator: the first one as the config says, others on ports of their own."""
    own = [listener for listener in own_listeners(config) if listener.replica == replica]
    moved = [f"orchestrator.{one.option}={one.address}" for one in own if one.port] if replica else []
    moved += ["launch.orchestrators=1"] if replica else []  # it has no further ones itself
    sets = [part for override in (*overrides, *moved) for part in ("--set", override)]
    name = f"orchestrator-{replica}" if replica else "orchestrator"
    return ProcessSpec(
        name=name,
        role="orchestrator",
        argv=(around.python, "-m", "launch.cli", "orchestrator", config_path, *sets),
        env=dict(around.imports),
        ready_url=f"{public_url(config, replica)}/health",
        listens=tuple((one.host, one.port) for one in own),
        log_name=f"{name}.log",
    )


# --- workers ----------------------------------------------------------------------------------------


def worker_process(
    config: Config,
    place: WorkerPlace,
    address: WorkerAddress,
    gpus: tuple[int, ...],
    around: Surroundings,
    *,
    listens_at: str | None = None,
    span: Span | None = None,
) -> ProcessSpec:
    """Return what starts one worker of the config. Raises `PlanError`.

    Its server listens `listens_at`, if that is another host than the one it is reached at; `span` is its part
    of an engine that spans several machines.
    """
    return _worker(
        Worker(
            place,
            address,
            gpus,
            around,
            publishes_kv_events=config.routing.hears_caches(address.role),
            takes_priorities=address.role == "prefill" and config.routing.prefill_order == "shortest",
            listens_at=listens_at,
            span=span,
        )
    )


def worker_at(
    config: Config,
    place: WorkerPlace,
    ports: tuple[int, int],
    gpus: tuple[int, ...],
    around: Surroundings,
) -> ProcessSpec:
    """Return what starts a worker that the config does not place, at its host and on these ports: its own,
    and that of its side channel. Raises `PlanError`.
    """
    port, side_channel = ports
    address = WorkerAddress(
        name=place.name,
        model=place.model.name,
        served_model=place.pool.served_model or place.model.name,
        role=place.role,
        url=f"http://{join_address(place.worker.host, port)}",
        host=place.worker.host,
        port=port,
        side_channel_port=side_channel,
        is_managed=True,
        zone=place.pool.zone,
    )
    return worker_process(config, place, address, gpus, around)


def _worker(worker: Worker) -> ProcessSpec:
    address = worker.address
    command = ENGINES[worker.place.pool.engine].command(worker)
    first, engines = address.side_channel_port, worker.place.pool.data_parallel_size
    ports = [address.port, *(() if first is None else range(first, first + engines)), *worker.kv_event_ports]
    return ProcessSpec(
        name=address.name,
        role=address.role,
        argv=(worker.around.python, *command.argv, *worker.user_args),
        env=_with_imports(command.env, worker.around),
        ready_url=f"{address.url}/health",
        listens=tuple((address.host, port) for port in ports),
        log_name=log_name(address.name),
        gpus=worker.gpus,
    )


def _with_imports(env: Mapping[str, str], around: Surroundings) -> dict[str, str]:
    """Return the worker's environment: where it names a PYTHONPATH and we need one, ours comes first."""
    paths = [given[PATH_ENV] for given in (around.imports, env) if given.get(PATH_ENV)]
    return {**around.imports, **env, **({PATH_ENV: os.pathsep.join(paths)} if paths else {})}


def named(spec: ProcessSpec, name: str) -> ProcessSpec:
    """Return the process under the name that the worker has at the orchestrator."""
    return replace(spec, name=name, log_name=log_name(name))


def log_name(worker: str) -> str:
    """Return a name that differs from worker to worker: its only plus signs are the model's slashes."""
    model, role, index = worker.rsplit("/", 2)
    return f"{quote(model, safe='/').replace('/', '+')}-{role}-{index}.log"


def _allot_gpus(places: Sequence[WorkerPlace]) -> Mapping[str, tuple[int, ...]]:
    """Give each worker the GPUs that the file names, the others the next free ones of their host."""
    with_gpus = [place for place in places if ENGINES[place.pool.engine].takes_gpus(place.pool)]
    given: dict[str, set[int]] = defaultdict(set)
    for place in with_gpus:
        given[machine(place.worker.host)].update(place.worker.gpus or ())
    free = {host: _free(taken) for host, taken in given.items()}
    return {
        place.name: tuple(place.worker.gpus or _take(free[machine(place.worker.host)], place))
        for place in with_gpus
    }


def _free(taken: set[int]) -> Iterator[int]:
    gpu = 0
    while True:
        if gpu not in taken:
            yield gpu
        gpu += 1


def _take(free: Iterator[int], place: WorkerPlace) -> list[int]:
    return [next(free) for _ in range(place.pool.gpus_per_replica)]
