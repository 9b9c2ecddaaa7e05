"""All processes know the same workers: the supervisor publishes snapshots, data-plane processes follow.

A snapshot is the whole truth at one moment, so that one that is missed does no harm. In the other direction
a process reports at once what its legs have seen of a worker: the supervisor then decides for everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerSnapshot
from orchestrator.workers.states import Event
from orchestrator.workers.worker import Worker

# What legs tell of a worker; all else the supervisor knows first.
REPORTED = frozenset({Event.REFUSED, Event.LOST, Event.STALLED, Event.ERRED, Event.DENIED, Event.PROVEN})


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """A snapshot holds all workers: those of the config in its order, then those that were added."""

    version: int  # a higher one is newer
    workers: tuple[WorkerSnapshot, ...]


class Report(msgspec.Struct, frozen=True, tag=True):
    """A report says what a process has seen of a worker."""

    worker: str
    epoch: int  # of the worker, as the process knew it
    event: Event
    why: str | None
    reason: str | None = None  # in words that everybody may read


class Publisher:
    """The supervisor's publisher makes snapshots, inside the event loop that changes the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.snapshot = Snapshot(1, registry.snapshots())  # the newest
        self._published = asyncio.Event()  # replaced with every snapshot
        self._is_due = False
        registry.news.changed.add(self._note_change)

    async def wait_newer(self, version: int) -> Snapshot:
        """Return the newest snapshot, once it is newer than `version`."""
        while self.snapshot.version <= version:
            await self._published.wait()
        return self.snapshot

    def note(self, report: Report) -> None:
        """Act on what a process has seen, unless the worker has come back since or is not there any more."""
        worker = self._registry.find(report.worker)
        if worker is not None:
            self._registry.judge.note_seen(worker, report.epoch, report.event, report.why, report.reason)

    def _note_change(self) -> None:
        """Make one snapshot of all that changes in a turn of the event loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._is_due = False
        workers = self._registry.snapshots()
        if workers == self.snapshot.workers:  # a probe failed once more
            return
        self.snapshot = Snapshot(self.snapshot.version + 1, workers)
        published, self._published = self._published, asyncio.Event()
        published.set()


class Follower:
    """A data-plane process's follower applies snapshots, and reports what legs see."""

    def __init__(self, registry: Registry, report: Callable[[Report], None]) -> None:
        """Have `report` called from the event loop with what legs see of workers."""
        self._registry = registry
        self._report = report
        self._version = 0
        registry.news.moved.add(self._note_move)

    def apply(self, snapshot: Snapshot) -> None:
        """Take a snapshot over if it is newer than what was applied before."""
        if snapshot.version > self._version:
            self._version = snapshot.version
            self._registry.follow(snapshot.workers)

    def _note_move(self, worker: Worker, event: Event) -> None:
        if event in REPORTED:
            self._report(Report(worker.name, worker.epoch, event, worker.last_error, worker.reason))
