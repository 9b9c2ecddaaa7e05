"""A plan says which processes the config puts on this machine, and how each is started.

It is made without a look at the machine: `up`, `up --dry-run`, `plan` and `worker` all take it from here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from launch.engines import ENGINES
from launch.engines.base import PlanError, Span, Surroundings, Worker
from orchestrator.config.addresses import WorkerAddress, WorkerPlace, machine, worker_addresses, worker_places
from orchestrator.config.options import WILDCARDS, Config, join_address, split_address
from orchestrator.config.printing import is_secret_variable
from orchestrator.interpreter import PATH_ENV
from orchestrator.wire.info import Role


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """This starts a process, in a session of its own, in the working directory of whoever starts it."""

    name: str  # MODEL/ROLE/INDEX, or "orchestrator"
    role: Role | Literal["orchestrator", "build"]
    argv: tuple[str, ...]
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
    admin: str | None = None  # where operators reach the admin listener; None without one
    discovered: tuple[str, ...] = ()  # pools whose workers the orchestrator finds, each with its source
    build: ProcessSpec | None = None  # builds the orchestrator's compiled form meanwhile, and ends

    @property
    def processes(self) -> tuple[ProcessSpec, ...]:
        """Return all of them in the order of their start."""
        return (*self.workers, self.orchestrator)


def make_plan(config: Config, config_path: str, overrides: Sequence[str], around: Surroundings) -> Plan:
    """Return everything that the file puts on this machine. Raises `PlanError`."""
    if split_address(config.orchestrator.listen)[1] == 0:
        raise PlanError("orchestrator.listen has port 0: give a port, so that others can be told of it")
    managed = [address for address in worker_addresses(config) if address.is_managed]
    here = [address.name for address in managed if around.is_here(address.host)]
    return Plan(
        workers=tuple(worker_specs(config, around, only=here).values()),
        orchestrator=orchestrator_process(config, config_path, overrides, around),
        elsewhere=tuple(address.name for address in managed if address.name not in here),
        url=public_url(config),
        admin=admin_url(config),
        discovered=tuple(_discovered(config)),
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


def public_url(config: Config) -> str:
    host, port = split_address(config.orchestrator.listen)
    return f"{_scheme(config)}://{join_address(_reachable(host), port)}"


def _scheme(config: Config) -> str:
    """Return what both listeners speak."""
    return "http" if config.orchestrator.tls is None else "https"


def admin_url(config: Config) -> str | None:
    """Return where the admin listener is reached from this machine; None if nobody can know."""
    if config.orchestrator.admin is None:
        return None
    host, port = split_address(config.orchestrator.admin)
    return f"{_scheme(config)}://{join_address(_reachable(host), port)}" if port else None


def _reachable(host: str) -> str:
    if host not in WILDCARDS:
        return host
    return "::1" if ":" in host else "127.0.0.1"


# --- the orchestrator -------------------------------------------------------------------------------


def orchestrator_process(
    config: Config, config_path: str, overrides: Sequence[str], around: Surroundings
) -> ProcessSpec:
    """Return what starts the orchestrator of the config in the file `config_path`."""
    addresses = (config.orchestrator.listen, config.orchestrator.admin)
    sets = [part for override in overrides for part in ("--set", override)]
    return ProcessSpec(
        name="orchestrator",
        role="orchestrator",
        argv=(around.python, "-m", "launch.cli", "orchestrator", config_path, *sets),
        env=dict(around.imports),
        ready_url=f"{public_url(config)}/health",
        listens=tuple(split_address(address) for address in addresses if address is not None),
        log_name="orchestrator.log",
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
