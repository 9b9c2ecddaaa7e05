"""The local backend has workers as process groups of this machine, each on the ports and GPUs of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

from launch.backends.base import Backend, Started
from launch.local.processes import Guard, ProcessGroup
from launch.plan import ProcessSpec
from orchestrator.config.options import Config


class Local(Backend):
    """It starts processes; `launch/local` restarts those that end, and its guard kills them all with `up`."""

    is_here: ClassVar[bool] = True

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    @classmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        return cls(guard)

    async def open(self, specs: Sequence[ProcessSpec]) -> None:
        """Do nothing: the ports and GPUs are those of the plan."""

    def start(self, spec: ProcessSpec, log: Path) -> Started:
        return ProcessGroup(spec, log, self._guard)

    async def close(self) -> None:
        """Do nothing: there are no places beside the processes."""

    @classmethod
    def sweep(cls, handle: Mapping[str, str]) -> None:
        """Do nothing: the guard has ended everything."""
