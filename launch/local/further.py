"""A run can have more workers than its config names: of its pools, on free ports and GPUs of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from launch.engines import ENGINES
from launch.engines.base import PlanError, Surroundings
from launch.plan import ProcessSpec, worker_at
from orchestrator.config.addresses import (
    SIDE_CHANNEL_OFFSET,
    WorkerPlace,
    worker_addresses,
)
from orchestrator.config.options import MAX_PORT, Config, ModelConfig, PoolConfig, WorkerConfig
from orchestrator.wire.info import Role

IsFree = Callable[[str, int], bool]


class FurtherWorkers:
    """It plans workers beyond those of the config. What it asks of the machine comes in at the edge."""

    def __init__(
        self, config: Config, around: Surroundings, is_free: IsFree, gpus: Callable[[], int | None]
    ) -> None:
        """`is_free` says whether one can listen at a host and port, `gpus` how many GPUs there are."""
        self._config = config
        self._around = around
        self._is_free = is_free
        self._gpus = gpus
        self._reserved = set(_ports_of(config))
        self.pools = {
            (model.name, role): (model, pool) for model in config.models for role, pool in model.pools()
        }

    def plan(
        self, model: str, role: Role, running: Sequence[ProcessSpec], of_config: Sequence[ProcessSpec] = ()
    ) -> ProcessSpec:
        """Return the process of one worker more beside those that run; give it its name by `named`.

        One `of_config` that does not run comes first. Raises `PlanError` if there cannot be one.
        """
        urls = {spec.url for spec in running}
        for spec in of_config:
            is_vacant = pool_of(spec.name) == (model, role) and spec.url not in urls
            if is_vacant and all(self._is_free(*listens) for listens in spec.listens):
                return spec
        owner, pool = self.pools[model, role]
        _check(pool)
        gpus = self._free_gpus(owner, role, pool, running)
        taken = self._reserved | {port for spec in running for _, port in spec.listens}
        host = next(
            (spec.listens[0][0] for spec in running if pool_of(spec.name) == (model, role)), "127.0.0.1"
        )
        for port in range(self._config.base_port, MAX_PORT + 1):
            if port in taken or not self._is_free(host, port):
                continue
            place = WorkerPlace(owner, role, 0, pool, WorkerConfig(host=host, port=port))
            ports = port, self._side_channel(host, taken)
            spec = worker_at(self._config, place, ports, gpus, self._around)
            if all(one not in taken and self._is_free(there, one) for there, one in spec.listens):
                return spec
        raise PlanError(f"no port from {self._config.base_port} up is free on {host}")

    def _side_channel(self, host: str, taken: set[int]) -> int:
        for port in range(self._config.base_port + SIDE_CHANNEL_OFFSET, MAX_PORT + 1):
            if port not in taken and self._is_free(host, port):
                return port
        raise PlanError(f"no port is free on {host} for a side channel")

    def _free_gpus(
        self, model: ModelConfig, role: Role, pool: PoolConfig, running: Iterable[ProcessSpec]
    ) -> tuple[int, ...]:
        if not ENGINES[pool.engine].takes_gpus(pool):
            return ()
        there = self._gpus()
        if there is None:
            raise PlanError("nobody knows how many GPUs this machine has")
        used = {gpu for spec in running for gpu in spec.gpus}
        free = [gpu for gpu in range(there) if gpu not in used][: pool.gpus_per_replica]
        if len(free) < pool.gpus_per_replica:
            raise PlanError(
                f"a worker of {model.name}/{role} takes {pool.gpus_per_replica} GPUs, and {len(free)} of "
                f"{there} are free"
            )
        return tuple(free)


def _check(pool: PoolConfig) -> None:
    if not pool.is_managed:
        raise PlanError("its workers are urls or discovered, which Baton does not start")
    if pool.data_parallel_size > 1:
        raise PlanError("its workers are data-parallel engines, which are added with a restart only")


def _ports_of(config: Config) -> Iterator[int]:
    """Yield all ports that the config gives to workers, whether or not they run."""
    for address in worker_addresses(config):
        yield address.port
        if address.side_channel_port is not None:
            yield address.side_channel_port


def pool_of(name: str) -> tuple[str, str]:
    """Return the model and the role of a worker."""
    model, _, role = name.rpartition("/")[0].rpartition("/")
    return model, role
