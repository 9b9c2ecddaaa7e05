"""The simulated engine is a worker without a model, for tests and trials (`worker/sim`)."""

from __future__ import annotations

from collections.abc import Iterator

from launch.engines.base import Command, Worker
from orchestrator.config.options import PoolConfig, SimConfig
from orchestrator.wire.info import WORKER_KEY_ENV


class Sim:
    """The simulated engine starts in a second and takes no GPU, whatever the pool's device."""

    def takes_gpus(self, pool: PoolConfig) -> bool:
        return False

    def command(self, worker: Worker) -> Command:
        return Command([*_argv(worker), *_options(worker.place.pool.sim)], worker.user_env)


def _argv(worker: Worker) -> list[str]:
    address = worker.address
    argv = ["-m", "worker.sim", "--model-name", address.served_model, "--role", address.role]
    argv += ["--host", worker.listen_host, "--port", str(address.port)]
    if worker.listen_host != address.host:
        argv += ["--side-channel-host", address.host]
    argv += ["--side-channel-port", str(address.side_channel_port)]
    if worker.publishes_kv_events:
        endpoint, replay = worker.kv_events
        argv += ["--kv-events", endpoint, "--kv-events-replay", replay]
    if worker.place.pool.data_parallel_size > 1:
        argv += ["--data-parallel-size", str(worker.place.pool.data_parallel_size)]
    if worker.takes_priorities:
        argv += ["--scheduling-policy", "priority"]
    if worker.around.environ.get(WORKER_KEY_ENV):
        argv += ["--api-key-env", WORKER_KEY_ENV]
    return argv


def _options(sim: SimConfig) -> Iterator[str]:
    for key in SimConfig.model_fields:
        if key in sim.model_fields_set:
            yield f"--{key.replace('_', '-')}"
            yield str(getattr(sim, key))
