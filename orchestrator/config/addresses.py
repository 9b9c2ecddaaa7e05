"""The workers' addresses follow from the config alone: the same in every process that reads the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from orchestrator.config.options import (
    Config,
    ModelConfig,
    PoolConfig,
    WorkerConfig,
    join_address,
    split_address,
)
from orchestrator.wire.info import Role

SIDE_CHANNEL_OFFSET = 1000  # from base_port to the first side channel
MAX_PORT = 65535


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
    zone: str | None = None  # that the config says it is in
    gets_credential: bool = True  # it is sent BATON_WORKER_API_KEY, if there is one


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
    """Return all workers in the order of the file: by model, then prefill, decode, both.

    Raises `ValueError` if there are too few ports above `base_port`.
    """
    ports = _Ports(config)
    return tuple(_address(place, ports) for place in worker_places(config))


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
    for index, worker in enumerate(pool.workers or [WorkerConfig()] * (pool.replicas or 1)):
        yield WorkerPlace(model, role, index, pool, worker)


def _address(place: WorkerPlace, ports: _Ports) -> WorkerAddress:
    if place.url is not None:
        return unmanaged(
            place.model.name,
            place.role,
            place.index,
            place.url,
            place.pool.served_model,
            place.pool.zone_of(place.url),
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
        side_channel_port=place.worker.side_channel_port or ports.next_side_channel(host),
        is_managed=True,
        zone=place.worker.zone or place.pool.zone,
    )


def unmanaged(
    model: str, role: Role, index: int, url: str, served_model: str | None, zone: str | None = None
) -> WorkerAddress:
    """Return the address of a worker that Baton never starts. `url` is as the config's type has it."""
    host, port = split_address(urlsplit(url).netloc)
    return WorkerAddress(
        name=f"{model}/{role}/{index}",
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


@dataclass
class _Ports:
    """This allots ports, each machine's upwards from the base, around those that the file gives."""

    config: Config
    _taken: set[tuple[str, int]] = field(default_factory=set)
    _tried: dict[tuple[str, int], int] = field(default_factory=dict)  # by machine and base: the next to try

    def __post_init__(self) -> None:
        for place in worker_places(self.config):
            if place.url is not None:
                host, port = split_address(urlsplit(place.url).netloc)
                self._taken.add((machine(host), port))
            for given in (place.worker.port, place.worker.side_channel_port):
                if given is not None:
                    self._taken.add((machine(place.worker.host), given))
        # The orchestrator's machine may have other addresses too: keep off its ports everywhere.
        orchestrator = self.config.orchestrator
        self._own = {split_address(a)[1] for a in (orchestrator.listen, orchestrator.admin) if a is not None}

    def next_http(self, host: str) -> int:
        return self._next(host, self.config.base_port)

    def next_side_channel(self, host: str) -> int:
        return self._next(host, self.config.base_port + SIDE_CHANNEL_OFFSET)

    def _next(self, host: str, first: int) -> int:
        key = machine(host)
        for port in range(self._tried.get((key, first), first), MAX_PORT + 1):
            if port not in self._own and (key, port) not in self._taken:
                self._taken.add((key, port))
                self._tried[key, first] = port + 1
                return port
        raise ValueError(f"no port from {first} up is left on {host}: lower base_port")
