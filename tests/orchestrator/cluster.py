"""Workers without processes, for tests of what chooses among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.options import HealthConfig
from orchestrator.processes.rows import Rows
from orchestrator.telemetry.counters import Layout
from orchestrator.wire.info import Encoding, Role, TokenIdsForm, WorkerInfo
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker


def address(
    role: Role, index: int, *, model: str = "m", port: int = 1, served: str | None = None
) -> WorkerAddress:
    return WorkerAddress(
        name=f"{model}/{role}/{index}",
        model=model,
        served_model=served or model,
        role=role,
        url=f"http://127.0.0.1:{port}",
        host="127.0.0.1",
        port=port,
        side_channel_port=None,
        is_managed=False,
    )


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def registry_of(
    counts: Mapping[Role, int],
    *,
    transport: str = "json",
    ready: bool = True,
    clock: Clock | None = None,
    **health: Any,
) -> Registry:
    """One model `m` with so many workers of each role. `health` as in the config."""
    addresses = [address(role, index) for role, count in counts.items() for index in range(count)]
    config = HealthConfig.model_validate(health)
    registry = Registry(addresses, ["m"], transport, health=config, time=clock or Clock(), random=Random(1))
    if ready:
        for worker in registry.workers:
            registry.judge.mark_ready(worker)
    return registry


def processes_of(count: int) -> list[Registry]:
    """Registries over the same two decode workers, as processes have them."""
    addresses = [address("decode", index) for index in range(2)]
    rows = Rows.create(Layout(["m"], []), len(addresses), 1 + count)
    made = [Registry(addresses, ["m"], "json", rows.loads(row)) for row in range(1, 1 + count)]
    rows.close()
    for registry in made:
        for worker in registry.workers:
            registry.judge.mark_ready(worker)
    return made


def announcement(*decodes: Encoding, token_ids: Sequence[TokenIdsForm] = ()) -> WorkerInfo:
    return WorkerInfo(
        role="both",
        model="m",
        decodes=list(decodes),
        engine="vllm",
        engine_version="0",
        token_ids=list(token_ids),
    )


@contextlib.contextmanager
def seat(worker: Worker) -> Iterator[Worker]:
    """A leg's place on a worker, without the leg."""
    worker.count_leg(1)
    try:
        yield worker
    finally:
        worker.count_leg(-1)


def names(workers: Sequence[Worker]) -> list[str]:
    return [worker.name.removeprefix("m/") for worker in workers]
