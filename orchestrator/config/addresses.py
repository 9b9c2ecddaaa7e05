"""The workers' addresses follow from the config alone: the same in every process that reads the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from orchestrator.config.options import (
    MAX_PORT,
    Config,
    ModelConfig,
    PoolConfig,
    WorkerConfig,
    join_address,
    split_address,
)
from orchestrator.wire.info import Role

REPLICA_PORTS = 10  # from the listeners of an orchestrator to those of the next one
SIDE_CHANNEL_OFFSET = 1000  # from base_port to the first side channel


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """An address says of one worker where it listens and what it is for."""

    name: str  # MODEL/ROLE/INDEX, unique
    model: str  # what clients call it
    served_model: str  # what the worker calls it
    role: Role
    url: str  # http(s)://HOST:PORT, no path
    host: str
    port: int
    side_channel_port: int | None  # None for workers that Baton never starts
    is_managed: bool  # started by `baton up` or `baton worker`
    rank: int | None = None  # of a data-parallel engine of the worker; None if it has only one
    zone: str | None = None  # that the config says it is in
    gets_credential: bool = True  # it is sent BATON_WORKER_API_KEY, if there is one
    is_discovered: bool = False  # a source has named it (`orchestrator/discovery`)


@dataclass(frozen=True, slots=True)
class OwnListener:
    """An orchestrator listens there: the first one of a run, or a further one on ports of its own."""

    option: str  # listen or admin
    replica: int
    host: str
    port: int  # 0: any that is free, known only once it is taken; it may be none, where there are too few

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def own_listeners(config: Config) -> tuple[OwnListener, ...]:
    """Return where all orchestrators that `baton up` starts listen."""
    options = {"listen": config.orchestrator.listen, "admin": config.orchestrator.admin}
    given = {option: split_address(address) for option, address in options.items() if address is not None}
    return tuple(
        OwnListener(option, replica, host, port + replica * REPLICA_PORTS if port else 0)
        for replica in range(config.launch.orchestrators)
        for option, (host, port) in given.items()
    )


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """A place has what `WorkerAddress` leaves out of a worker in the file, for those who start it."""

    model: ModelConfig
    role: Role
    index: int
    pool: PoolConfig
    worker: WorkerConfig  # its own settings; defaults for replicas
    url: str | None = None  # of a worker that Baton never starts

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.role}/{self.index}"


def worker_addresses(config: Config) -> tuple[WorkerAddress, ...]:
    """Return all workers in the order of the file: by model, then prefill, decode, both. Of workers that are
    discovered, those are among them that a launcher starts.

    Raises `ValueError` if there are too few ports above `base_port`.
    """
    ports = _Ports(config)
    return tuple(_address(place, ports) for place in worker_places(config))


def routed_addresses(config: Config) -> tuple[WorkerAddress, ...]:
    """Return all that requests can be sent to, in the same order: each data-parallel engine of a worker by
    itself. Workers that are discovered are not among them.
    """
    pairs = zip(worker_places(config), worker_addresses(config), strict=True)
    return tuple(
        ranked
        for place, address in pairs
        if place.pool.discover is None
        for ranked in ranks_of(address, place.pool.data_parallel_size)
    )


def ranks_of(address: WorkerAddress, size: int) -> tuple[WorkerAddress, ...]:
    """Return the data-parallel engines of a worker that has so many. vLLM counts side channels up by rank."""
    if size == 1:
        return (address,)
    first = address.side_channel_port
    return tuple(
        replace(
            address,
            name=f"{address.name}.dp{rank}",
            rank=rank,
            side_channel_port=None if first is None else first + rank,
        )
        for rank in range(size)
    )


def worker_places(config: Config) -> tuple[WorkerPlace, ...]:
    """Return the same workers in the same order as `worker_addresses`."""
    return tuple(
        place
        for model in config.models
        for role, pool in model.pools()
        for place in _places(model, role, pool)
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`. Names other than localhost count as reachable."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_allowed_worker(host: str, allowed: Iterable[str]) -> bool:
    """Return whether one of `orchestrator.allow_workers` is this host.

    A name is compared with names only: whoever answers for it could have it lead anywhere.
    """
    return any(_is_meant(host.lower().removesuffix("."), pattern) for pattern in allowed)


def _is_meant(host: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    try:
        return ip_address(host) in ip_network(pattern)
    except ValueError:  # one of them is a name
        return host == pattern


def machine(host: str) -> str:
    """Return a key for ports that exclude each other: all loopback hosts are one."""
    return "loopback" if is_loopback(host) else host.lower()


def _places(model: ModelConfig, role: Role, pool: PoolConfig) -> Iterator[WorkerPlace]:
    if pool.urls is not None:
        for index, url in enumerate(pool.urls):
            yield WorkerPlace(model, role, index, pool, WorkerConfig(), url)
        return
    if not pool.is_managed:
        return  # its workers are known once they are discovered
    for index, worker in enumerate(pool.workers or [WorkerConfig()] * pool.count):
        yield WorkerPlace(model, role, index, pool, worker)


def zone_of(place: WorkerPlace) -> str | None:
    """Return the zone that the config has a worker in."""
    if place.url is not None:
        return place.pool.zone_of(place.url)
    return place.worker.zone or place.pool.zone


def _address(place: WorkerPlace, ports: _Ports) -> WorkerAddress:
    if place.url is not None:
        return unmanaged(
            place.model.name,
            place.role,
            place.index,
            place.url,
            place.pool.served_model,
            zone_of(place),
        )
    host = place.worker.host
    port = place.worker.port or ports.next_http(host)
    return WorkerAddress(
        name=place.name,
        model=place.model.name,
        served_model=place.pool.served_model or place.model.name,
        role=place.role,
        url=f"http://{join_address(host, port)}",
        host=host,
        port=port,
        side_channel_port=place.worker.side_channel_port
        or ports.next_side_channel(host, place.pool.data_parallel_size),
        is_managed=True,
        zone=zone_of(place),
    )


def unmanaged(
    model: str, role: Role, name: str | int, url: str, served_model: str | None, zone: str | None = None
) -> WorkerAddress:
    """Return the address of a worker that Baton never starts, with its name within its pool. `url` is as the
    config's type has it.
    """
    host, port = split_address(urlsplit(url).netloc)
    return WorkerAddress(
        name=f"{model}/{role}/{name}",
        model=model,
        served_model=served_model or model,
        role=role,
        url=url,
        host=host,
        port=port,
        side_channel_port=None,
        is_managed=False,
        zone=zone,
    )


def _run(first: int | None, count: int) -> range:
    return range(0) if first is None else range(first, first + count)


@dataclass
class _Ports:
    """This allots ports, each machine's upwards from the base, around those that the file gives."""

    config: Config
    _taken: set[tuple[str, int]] = field(default_factory=set)
    # Where to go on looking, by machine, base and count: what did not fit before does not fit later.
    _begins: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in worker_places(self.config):
            if place.url is not None:
                host, port = split_address(urlsplit(place.url).netloc)
                self._taken.add((machine(host), port))
            given = [place.worker.port, *_run(place.worker.side_channel_port, place.pool.data_parallel_size)]
            host = machine(place.worker.host)
            self._taken.update((host, port) for port in given if port is not None)
        # The orchestrators' machine may have other addresses too: keep off their ports everywhere.
        self._own = {listener.port for listener in own_listeners(self.config)}

    def next_http(self, host: str) -> int:
        return self._next(host, self.config.base_port, 1)

    def next_side_channel(self, host: str, count: int) -> int:
        """Allot the next ports of which so many follow each other, and return the first."""
        return self._next(host, self.config.base_port + SIDE_CHANNEL_OFFSET, count)

    def _next(self, host: str, first: int, count: int) -> int:
        key = machine(host)
        begin = self._begins.get((key, first, count), first)
        for port in range(begin, MAX_PORT + 2 - count):
            run = _run(port, count)
            if not any(one in self._own or (key, one) in self._taken for one in run):
                self._taken.update((key, one) for one in run)
                self._begins[key, first, count] = port + count
                return port
        raise ValueError(f"no port from {first} up is left on {host}: lower base_port")
