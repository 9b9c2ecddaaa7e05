"""From the config to the workers' addresses: pure, the same in every process that reads the file."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import Config
from orchestrator.wire.info import Role


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """One worker, where it listens and what it is for."""

    name: str  # MODEL/ROLE/INDEX, unique
    model: str  # what clients call it
    served_model: str  # what the worker calls it
    role: Role
    url: str  # http(s)://HOST:PORT, no path
    host: str
    port: int
    side_channel_port: int | None  # None for workers that Baton never starts
    is_managed: bool  # started by `baton up` or `baton worker`


def worker_addresses(config: Config) -> tuple[WorkerAddress, ...]:
    """All workers, in the order of the file; models first, then prefill, decode, both."""
    raise NotImplementedError
