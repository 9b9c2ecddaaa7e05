"""An engine turns a worker of the config into the command that starts it.

A new engine is one file beside this one, one entry in `ENGINES` and its name in the config's `engine` option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.config.addresses import WorkerAddress, WorkerPlace, is_loopback
from orchestrator.config.options import MAX_PORT, PoolConfig

# From a worker's own port to those of its KV events, where other machines are to reach them.
KV_EVENTS_OFFSET = 2000
KV_REPLAY_OFFSET = 3000


class PlanError(Exception):
    """The config is right, but it cannot be carried out here. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A plan depends on these beside the config. They are gathered at the edge, in `surroundings.py`."""

    python: str  # the interpreter that every process runs in
    environ: Mapping[str, str]  # inherited by every process
    vllm_plugins: Sequence[str]  # those that vLLM loads when VLLM_PLUGINS is not set
    is_directory: Callable[[str], bool]
    is_here: Callable[[str], bool]  # whether a host is this machine
    imports: Mapping[str, str] = field(default_factory=dict)  # set for every process: where it imports from


@dataclass(frozen=True, slots=True)
class Worker:
    """An engine gets to know this of the worker that it is to start."""

    place: WorkerPlace
    address: WorkerAddress
    gpus: tuple[int, ...]  # counted among those that the inherited environment shows; empty without GPUs
    around: Surroundings
    publishes_kv_events: bool = False  # routing goes by them
    takes_priorities: bool = False  # prompts are computed by the priorities that requests have

    @property
    def kv_events(self) -> tuple[str, str]:
        """Return the ZeroMQ endpoints that it publishes its KV events at, and repeats them at: names that
        nobody outside this machine reaches, if nobody reaches the worker itself there. Raises `PlanError`.
        """
        if is_loopback(self.address.host):
            name = f"ipc://@baton-kv-events-{self.address.port}"
            return name, f"{name}-again"
        events, again = self.kv_event_ports
        if again > MAX_PORT:
            raise PlanError(
                f"{self.address.name} has no ports {events} and {again} for its KV events: "
                "give it a lower port"
            )
        return f"tcp://*:{events}", f"tcp://*:{again}"

    @property
    def kv_event_ports(self) -> tuple[int, ...]:
        """Return the ports of these endpoints, if they have any."""
        if not self.publishes_kv_events or is_loopback(self.address.host):
            return ()
        return self.address.port + KV_EVENTS_OFFSET, self.address.port + KV_REPLAY_OFFSET

    @property
    def user_args(self) -> list[str]:
        """Return the arguments that the config gives: the pool's, then the worker's own."""
        return [*self.place.pool.args, *self.place.worker.args]

    @property
    def user_env(self) -> dict[str, str]:
        """Return the environment that the config gives: the worker's own wins over the pool's."""
        return self.place.pool.env | self.place.worker.env


@dataclass(frozen=True, slots=True)
class Command:
    """A process is started by these: the interpreter is put before `argv`, the user's arguments after it."""

    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)  # over the inherited one; the user's is part of it


class Engine(Protocol):
    """Its processes listen at the worker's address and answer `/health` with 200 once they are up.

    Both methods are pure: all that they may ask of this machine is in `Worker.around`.
    """

    def takes_gpus(self, pool: PoolConfig) -> bool:
        """Say whether workers of the pool are given GPUs of their own."""
        ...

    def command(self, worker: Worker) -> Command:
        """Return what starts the worker. Raises `PlanError` if it cannot run here.

        A secret goes into `env` under a name that says so (see `is_secret_variable`), never into `argv`.
        """
        ...
