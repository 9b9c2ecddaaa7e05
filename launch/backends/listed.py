"""Several orchestrators on this machine find its workers in a folder of members: all know the same."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, cast

from launch.backends.base import Started
from launch.backends.local import Local
from launch.local.further import FurtherWorkers, pool_of
from launch.local.processes import Guard
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
        self._uids: dict[str, str] = {}  # of the latest start, by the worker's name
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
        group = super().start(spec, log)
        self._uids[spec.name] = secrets.token_hex(8)
        write_member(self._folder, self._member(spec, self._uids[spec.name]))
        return group

    def dismiss(self, name: str) -> None:
        """Take a worker off the list: until then it may be started again, and probes tell how it is."""
        if (uid := self._uids.pop(name, None)) is not None:
            remove_member(self._folder, uid)

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
