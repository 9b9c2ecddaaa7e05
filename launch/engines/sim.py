"""The simulated engine."""

from __future__ import annotations

from collections.abc import Iterator

from launch.engines.base import WORKER_KEY_ENV, Start, Worker
from orchestrator.config.options import SimConfig


def _sim(worker: Worker) -> Start:
    address = worker.address
    argv = ["-m", "worker.sim", "--model-name", address.served_model, "--role", address.role]
    argv += ["--host", address.host, "--port", str(address.port)]
    argv += ["--side-channel-port", str(address.side_channel_port)]
    if worker.around.environ.get(WORKER_KEY_ENV):
        argv += ["--api-key-env", WORKER_KEY_ENV]
    return Start([*argv, *_sim_options(worker.place.pool.sim)], worker.user_env)


def _sim_options(sim: SimConfig) -> Iterator[str]:
    for key in SimConfig.model_fields:
        if key in sim.model_fields_set:
            yield f"--{key.replace('_', '-')}"
            yield str(getattr(sim, key))
