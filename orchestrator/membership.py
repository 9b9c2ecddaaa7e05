"""Who is there, the same in every process: the supervisor publishes snapshots, data-plane processes follow.

A snapshot is the whole truth at one moment, so that one that is missed does no harm. In the other direction
a process reports a worker that refused it at once: the supervisor then takes it out for everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from orchestrator.workers import Registry, Standing, Worker


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """All workers, in the order of the config."""

    version: int  # a higher one is newer
    standings: tuple[Standing, ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A worker did not take a leg."""

    worker: str
    epoch: int  # of the worker, as the process knew it
    why: str


class Publisher:
    """The supervisor's side. Made inside the event loop that changes the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._workers = {worker.name: worker for worker in registry.workers}
        self.snapshot = Snapshot(1, registry.standings())  # the newest
        self._published = asyncio.Event()  # replaced with every snapshot
        self._is_due = False
        registry.on_change(self._note_change)

    async def wait_newer(self, version: int) -> Snapshot:
        """The newest snapshot, once it is newer than `version`."""
        while self.snapshot.version <= version:
            await self._published.wait()
        return self.snapshot

    def note(self, refused: Refused) -> None:
        """Take a worker out; not if it has come back since."""
        worker = self._workers[refused.worker]
        if worker.epoch == refused.epoch:
            self._registry.mark_gone(worker, refused.why)

    def _note_change(self) -> None:
        """One snapshot for all that changes in a turn of the event loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._is_due = False
        standings = self._registry.standings()
        if standings == self.snapshot.standings:  # a probe failed once more
            return
        self.snapshot = Snapshot(self.snapshot.version + 1, standings)
        published, self._published = self._published, asyncio.Event()
        published.set()


class Follower:
    """A data-plane process's side."""

    def __init__(self, registry: Registry, report: Callable[[Refused], None]) -> None:
        """`report` is called from the event loop for each worker that refused."""
        self._registry = registry
        self._report = report
        self._version = 0
        registry.on_gone(self._note_gone)

    def apply(self, snapshot: Snapshot) -> None:
        """Take it over, if it is newer than what was applied before."""
        if snapshot.version <= self._version:
            return
        self._version = snapshot.version
        for worker, standing in zip(self._registry.workers, snapshot.standings, strict=True):
            self._registry.adopt(worker, standing)

    def _note_gone(self, worker: Worker) -> None:
        self._report(Refused(worker.name, worker.epoch, worker.last_error or ""))
