"""What a backend places elsewhere is found by the orchestrator: it looks at the members of the backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from launch.engines.base import PlanError
from launch.local.control import CommandFailed
from launch.local.further import pool_of
from launch.local.registrar import Registrar
from launch.plan import Plan, ProcessSpec, placed_spec
from orchestrator.config.options import Config
from orchestrator.wire.info import Role

GONE_S: Final = (
    10.0  # from the end of a worker's file, or of its process, until the orchestrator has removed it
)
POLL_S: Final = 0.1


def with_members(config: Config, plan: Plan, folder: Path) -> Plan:
    """Return the plan with an orchestrator that finds the workers in this folder of members."""
    orchestrator = plan.orchestrator
    argv = (*orchestrator.argv, *_overrides(config, folder))
    return replace(plan, orchestrator=replace(orchestrator, argv=argv))


def _overrides(config: Config, folder: Path) -> Iterator[str]:
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            if not pool.is_managed:
                continue
            yield from ("--set", f"models.{index}.{role}.discover.file={folder.absolute()}")
            if pool.replicas is None:  # it has some: else its engine's settings would be nobody's
                yield from ("--set", f"models.{index}.{role}.replicas=1")


class PlacedWorkers:
    """It plans workers beyond those of the config, under the next free name: their backend finds a place."""

    def __init__(self, config: Config) -> None:
        self.pools = {
            (model.name, role): (model, pool) for model in config.models for role, pool in model.pools()
        }

    def plan(
        self, model: str, role: Role, running: Sequence[ProcessSpec], of_config: Sequence[ProcessSpec] = ()
    ) -> ProcessSpec:
        """Return the process of one worker more than those that run. Raises `PlanError` if it cannot be."""
        if not self.pools[model, role][1].is_managed:
            raise PlanError("its workers are not started by Baton")
        taken = {spec.name for spec in running if pool_of(spec.name) == (model, role)}
        index = next(index for index in range(len(taken) + 1) if f"{model}/{role}/{index}" not in taken)
        return placed_spec(f"{model}/{role}/{index}", role)


class DiscoveringRegistrar(Registrar):
    """Workers come and go by the files of members, which their backend keeps; all else is as anywhere."""

    is_discovering = True

    async def add(self, spec: ProcessSpec, model: str, served_model: str | None, zone: str | None) -> str:
        """Return the name that the worker will have once it is discovered."""
        return spec.name

    async def remove(self, name: str) -> None:
        """Do nothing: the worker is removed once its member's file is."""

    async def undrain(self, name: str) -> None:
        """Let a worker serve again. Another start of it, which nobody has drained, does so already."""
        if not await self._is_drained(name):
            return
        try:
            await super().undrain(name)
        except CommandFailed:  # it may be one that goes just now: that is not told apart here
            if not await self._is_gone(name):
                raise

    async def _is_gone(self, name: str) -> bool:
        """Return whether a drained worker goes within the time that its removal takes at most."""
        deadline = time.monotonic() + GONE_S
        while await self._is_drained(name):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _is_drained(self, name: str) -> bool:
        return any(row.name == name and row.is_drained for row in await self.rows())
