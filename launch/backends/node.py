"""A worker that a backend has placed is planned on its node, with an address, ports and GPUs of its own."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator, Mapping
from typing import Final, Self

from launch.engines import ENGINES
from launch.engines.base import PlanError
from launch.local.further import pool_of
from launch.plan import ProcessSpec, named, worker_at
from launch.surroundings import look_around, port_problem
from orchestrator.config.addresses import WorkerPlace
from orchestrator.config.options import Config, WorkerConfig

# Below the ports that Linux gives to outgoing connections, which begin at 32768, with the ports of KV events
# (3000 above a worker's own); above those that Ray gives to its own processes, which end at 19999.
FIRST_PORT: Final = 20_000
LAST_PORT: Final = 29_000
_TRIES: Final = 200


class Reserved:
    """These ports are kept from all other workers of Baton on this machine until they are closed.

    An engine may take minutes until it listens. Other programs may still take a port: the engine fails then,
    and is started anew on other ports.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()

    def take(self, host: str, port: int) -> bool:
        """Reserve a port if nobody listens there and no other worker has reserved it."""
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A name in the abstract namespace, as a port, belongs to one network namespace, and ends with us.
            held.bind(f"\0baton-port-{port}")
        except OSError:
            held.close()
            return False
        self._held.append(held)
        return port_problem(host, port) is None


def spec_here(
    config: Config,
    name: str,
    host: str,
    reserved: Reserved,
    environ: Mapping[str, str] = os.environ,
    rng: random.Random | None = None,
) -> ProcessSpec:
    """Return what starts the worker of this name (MODEL/ROLE/...) here, at `host`, on ports that are free.

    Its GPUs are the first of those that CUDA_VISIBLE_DEVICES of `environ` shows. Raises `PlanError`.
    """
    place = place_of(config, name, host)
    around = look_around(environ)
    gpus = tuple(range(place.pool.gpus_per_replica)) if _takes_gpus(place) else ()
    for ports in _drawn(rng or random.Random()):  # noqa: S311  # not for secrets
        spec = worker_at(config, place, ports, gpus, around)
        if all(reserved.take(*listens) for listens in spec.listens):
            return named(spec, name)
        reserved.close()
    raise PlanError(f"no ports between {FIRST_PORT} and {LAST_PORT} are free on {host}")


def place_of(config: Config, name: str, host: str = "localhost") -> WorkerPlace:
    """Return the place of a worker of one of the config's pools. Raises `PlanError` if there is none."""
    model_name, role_name = pool_of(name)
    for model in config.models:
        for role, pool in model.pools():
            if (model.name, role) == (model_name, role_name) and pool.is_managed:
                return WorkerPlace(model, role, 0, pool, WorkerConfig(host=host))
    raise PlanError(f"{name}: the config has no such pool whose workers Baton starts")


def gpus_of(config: Config, name: str) -> int:
    """Return how many GPUs a worker takes. Raises `PlanError`."""
    place = place_of(config, name)
    return place.pool.gpus_per_replica if _takes_gpus(place) else 0


def _takes_gpus(place: WorkerPlace) -> bool:
    return ENGINES[place.pool.engine].takes_gpus(place.pool)


def _drawn(rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield ports to try: a worker's own and the first of its side channel."""
    for _ in range(_TRIES):
        yield rng.randrange(FIRST_PORT, LAST_PORT), rng.randrange(FIRST_PORT, LAST_PORT)
