"""A fleet has all processes of a run: those of the plan, and the workers that an operator has added since."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from launch.backends.base import Backend
from launch.local.member import Limits, Member
from launch.local.progress import Progress
from launch.local.run_state import ProcessEntry
from launch.local.upkeep import Upkeep
from launch.plan import ProcessSpec

ORCHESTRATOR = "orchestrator"


class Fleet:
    """Nothing is started or stopped here, but by whoever has a member of it."""

    def __init__(
        self,
        specs: Iterable[ProcessSpec],
        directory: Path,
        limits: Limits,
        progress: Progress,
        here: Backend,
        backend: Backend,
    ) -> None:
        """The orchestrator is started `here`, on this machine; workers by the `backend`."""
        self.limits = limits
        self.progress = progress
        self.hurry = asyncio.Event()  # whoever is being stopped gets no more time
        self.is_ready = False  # all of them were, once
        self.operation: str | None = None  # what an operator has asked for and is under way
        self.moving: set[str] = set()  # workers that are being started or stopped as the load wants it
        self.scaled: Collection[tuple[str, str]] = ()  # model and role of pools that follow the load
        self.note: Callable[[], None] = lambda: None  # writes what runs, for other commands
        self.is_in_step = True  # the orchestrator has the workers that run, and no others
        self.dismissed: set[tuple[str, str]] = set()  # role and URL of workers that were stopped for good
        self.left_drained: set[str] = set()  # workers that are to be undrained once the orchestrator answers
        self._directory = directory
        self._here = here
        self._backend = backend
        self.of_config = tuple(specs)
        self.members = [self._made(spec) for spec in self.of_config]
        logs = [directory / member.spec.log_name for member in self.members]
        self.upkeep = Upkeep(logs, limits.log_bytes, limits.log_files, progress)

    def _made(self, spec: ProcessSpec) -> Member:
        backend = self._here if spec.role == ORCHESTRATOR else self._backend
        return Member(spec, self._directory / spec.log_name, self.limits, self.progress, backend)

    @property
    def orchestrator(self) -> Member:
        return next(member for member in self.members if member.spec.role == ORCHESTRATOR)

    @property
    def orchestrators(self) -> Sequence[Member]:
        return [member for member in self.members if member.spec.role == ORCHESTRATOR]

    @property
    def workers(self) -> Sequence[Member]:
        return [member for member in self.members if member.spec.role != ORCHESTRATOR]

    def expiring(self) -> Sequence[Member]:
        """Return the workers whose places are lost soon, but for those that come or go as the load wants."""
        return [
            member for member in self.workers if member.is_expiring and member.spec.name not in self.moving
        ]

    def find(self, name: str) -> Member | None:
        return next((member for member in self.members if member.spec.name == name), None)

    def entries(self) -> Sequence[ProcessEntry]:
        return [member.entry() for member in (*self.workers, *self.orchestrators)]

    def enlist(self, spec: ProcessSpec) -> Member:
        """Add a worker, and return it; it is not started yet."""
        log = self._directory / spec.log_name
        self.progress.add(spec.name, str(log))
        self.upkeep.add(log)
        member = self._made(spec)
        self.members.append(member)
        self.dismissed.discard((spec.role, spec.url))
        return member

    def rename(self, member: Member, name: str) -> None:
        """Call a worker as an orchestrator does that was started again; its log stays where it is."""
        self.progress.add(name, str(self._directory / member.entry().log))
        member.spec = replace(member.spec, name=name)

    def dismiss(self, member: Member) -> None:
        """Forget a worker, which was stopped."""
        self.members.remove(member)
        self._backend.dismiss(member.spec.name)
        self.dismissed.add((member.spec.role, member.spec.url))
