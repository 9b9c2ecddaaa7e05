"""A run can have more workers than its config names: of its pools, on free ports and GPUs of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from launch.engines import ENGINES
from launch.engines.base import PlanError, Surroundings
from launch.plan import ProcessSpec, log_name, worker_process
from orchestrator.config.addresses import (
    SIDE_CHANNEL_OFFSET,
    WorkerAddress,
    WorkerPlace,
    worker_addresses,
)
from orchestrator.config.options import (
    MAX_PORT,
    Config,
    ModelConfig,
    PoolConfig,
    WorkerConfig,
    join_address,
)
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
            spec = self._spec(owner, role, pool, host, port, self._side_channel(host, taken), gpus)
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

    def _spec(
        self,
        model: ModelConfig,
        role: Role,
        pool: PoolConfig,
        host: str,
        port: int,
        side_channel: int,
        gpus: tuple[int, ...],
    ) -> ProcessSpec:
        place = WorkerPlace(model, role, 0, pool, WorkerConfig(host=host, port=port))
        address = WorkerAddress(
            name=place.name,
            model=model.name,
            served_model=pool.served_model or model.name,
            role=role,
            url=f"http://{join_address(host, port)}",
            host=host,
            port=port,
            side_channel_port=side_channel,
            is_managed=True,
            zone=pool.zone,
        )
        return worker_process(self._config, place, address, gpus, self._around)


def _check(pool: PoolConfig) -> None:
    if not pool.is_managed:
        raise PlanError("its workers are urls or discovered, which Baton does not start")
    if pool.data_parallel_size > 1:
        raise PlanError("its workers are data-parallel engines, which are added with a restart only")


def named(spec: ProcessSpec, name: str) -> ProcessSpec:
    """Return the process under the name that the orchestrator has given to the worker."""
    return replace(spec, name=name, log_name=log_name(name))


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
