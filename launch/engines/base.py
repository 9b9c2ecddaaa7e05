"""What an engine is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.config.addresses import WorkerAddress, WorkerPlace

WORKER_KEY_ENV = "BATON_WORKER_API_KEY"  # what the orchestrator sends to its workers as bearer token


class PlanError(Exception):
    """The config is right, but it cannot be carried out here. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All that a plan depends on beside the config. Gathered at the edge, in `surroundings.py`."""

    python: str  # the interpreter that every process runs in
    environ: Mapping[str, str]  # inherited by every process
    vllm_plugins: Sequence[str]  # those that vLLM loads when VLLM_PLUGINS is not set
    is_directory: Callable[[str], bool]
    is_here: Callable[[str], bool]  # whether a host is this machine


@dataclass(frozen=True, slots=True)
class Worker:
    place: WorkerPlace
    address: WorkerAddress
    gpus: tuple[int, ...]
    around: Surroundings

    @property
    def user_args(self) -> list[str]:
        return [*self.place.pool.args, *self.place.worker.args]

    @property
    def user_env(self) -> dict[str, str]:
        return self.place.pool.env | self.place.worker.env


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine is started: `argv` without the interpreter and the user's arguments."""

    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
