"""Several orchestrators on this machine find its workers in a folder of members: all know the same."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, cast

from launch.backends.base import Started
from launch.backends.local import Local
from launch.local.further import FurtherWorkers, pool_of
from launch.local.processes import Guard, ProcessGroup
from launch.plan import ProcessSpec, named
from orchestrator.config.options import Config
from orchestrator.wire.info import Role
from orchestrator.wire.member import Member, remove_member, write_member


class ListedLocal(Local):
    """It keeps a file for each start of a worker in a folder of members."""

    def __init__(self, guard: Guard, folder: Path, config: Config) -> None:
        super().__init__(guard)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._zones = {
            (model.name, role): pool.zone for model in config.models for role, pool in model.pools()
        }

    @classmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        """Return the backend; the folder is made in the run's directory. Raises `OSError`."""
        return cls(guard, directory / "members", config)

    @property
    def members(self) -> Path | None:
        return self._folder

    def start(self, spec: ProcessSpec, log: Path) -> Started:
        group = _ListedGroup(spec, log, self._guard, self._folder)
        write_member(self._folder, self._member(spec, group.uid))
        return group

    def _member(self, spec: ProcessSpec, uid: str) -> Member:
        model, role = pool_of(spec.name)
        return Member(
            uid=uid,
            name=spec.name.rpartition("/")[2],
            model=model,
            role=cast("Role", role),
            url=spec.url,
            zone=self._zones.get((model, cast("Role", role))),
        )


class _ListedGroup(ProcessGroup):
    """It is listed until it was ended. One that ends by itself is found out by probes, and started again."""

    def __init__(self, spec: ProcessSpec, log: Path, guard: Guard, folder: Path) -> None:
        super().__init__(spec, log, guard)
        self.uid = secrets.token_hex(8)
        self._folder = folder

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        try:
            return await super().end(limit_s, hurry)
        finally:
            remove_member(self._folder, self.uid)


class ListedWorkers(FurtherWorkers):
    """It gives further workers their names, which all orchestrators take from the folder of members."""

    def plan(
        self, model: str, role: Role, running: Sequence[ProcessSpec], of_config: Sequence[ProcessSpec] = ()
    ) -> ProcessSpec:
        """Return the process of one worker more, under the next free name. Raises `PlanError`."""
        spec = super().plan(model, role, running, of_config)
        taken = {one.name for one in running}
        index = next(index for index in range(len(taken) + 1) if f"{model}/{role}/{index}" not in taken)
        return named(spec, f"{model}/{role}/{index}")
