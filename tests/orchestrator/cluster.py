"""Workers without processes, for tests of what chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.topology import WorkerAddress
from orchestrator.wire.info import Role
from orchestrator.workers import Registry, Worker


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


def registry_of(counts: Mapping[Role, int], *, transport: str = "json", ready: bool = True) -> Registry:
    """One model `m` with so many workers of each role."""
    addresses = [address(role, index) for role, count in counts.items() for index in range(count)]
    registry = Registry(addresses, ["m"], transport)
    if ready:
        for worker in registry.workers:
            registry.mark_ready(worker)
    return registry


def names(workers: Sequence[Worker]) -> list[str]:
    return [worker.name.removeprefix("m/") for worker in workers]
