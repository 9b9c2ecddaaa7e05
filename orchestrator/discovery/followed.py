"""A followed pool makes its workers those that a source lists, through the registry that decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from orchestrator.config.addresses import WorkerAddress, ranks_of, unmanaged
from orchestrator.config.options import PoolConfig
from orchestrator.discovery.base import PoolKey
from orchestrator.discovery.changes import Fate, Known, decide
from orchestrator.discovery.listed import Listed
from orchestrator.errors import Conflict
from orchestrator.wire.member import Member, Problem
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import IN_SERVICE
from orchestrator.workers.worker import Worker

MOST_EPOCHS: Final = 4096  # names of workers that have left, of which the last epoch is known

LOST: Final = "it has ended: its source lists another one in its place"


@dataclass(slots=True)
class _Record:
    """A member was made these workers: one, or its data-parallel engines."""

    member: Member
    workers: tuple[Worker, ...]
    is_drained: bool = False  # by us
    is_removed: bool = False  # by us
    is_dismissed: bool = False  # by the operator, for as long as the source lists this uid


class FollowedPool:
    """It belongs to a pool whatever its source is, so that another source takes over what is there."""

    def __init__(self, registry: Registry, key: PoolKey, options: PoolConfig) -> None:
        self._registry = registry
        self._key = key
        self._options = options
        self._records: dict[str, _Record] = {}
        self._epochs: dict[str, int] = {}  # of the last worker of a name that has left
        self._dismissed: dict[
            str, str
        ] = {}  # the uid, by name, of members whose workers the operator removed

    def known(self) -> Mapping[str, str]:
        """Return the uid of each worker that was taken, by its name."""
        return {name: record.member.uid for name, record in self._records.items()}

    def take(self, listed: Listed) -> tuple[list[str], list[str], list[Problem]]:
        """Make the workers those that are listed.

        Returns the names of those that join and of those that leave, and what cannot be done.
        """
        self._look(listed)
        known = [_known(name, record) for name, record in self._records.items()]
        changes = decide(listed, known)
        left = [name for name, fate in changes.fates.items() if self._apply(name, fate)]
        joined: list[str] = []
        problems = [*self._doubts(listed, changes.fates)]
        for name, member in changes.joining:
            if self._dismissed.get(name) != member.uid:
                try:
                    self._join(name, member)
                    joined.append(name)
                except Conflict as error:
                    problems.append(Problem(name, error.message))
        return joined, left, problems

    # --- what others have done ------------------------------------------------------------------

    def _look(self, listed: Listed) -> None:
        """Note which workers have been forgotten, and which the operator has removed."""
        there = frozenset(self._registry.workers)
        for name, record in list(self._records.items()):
            is_there = not there.isdisjoint(record.workers)
            if not record.is_removed and (not is_there or _is_leaving(record.workers)):
                self._dismissed[name] = record.member.uid
                record.is_dismissed = True
            if not is_there:
                self._forget(name)
        if listed.members and self._dismissed:
            uids = {name: member.uid for name, member in listed.members.items()}
            self._dismissed = {name: uid for name, uid in self._dismissed.items() if uids.get(name) == uid}

    def _forget(self, name: str) -> None:
        record = self._records.pop(name)
        self._epochs.pop(name, None)
        self._epochs[name] = max(worker.epoch for worker in record.workers)
        if len(self._epochs) > MOST_EPOCHS:
            del self._epochs[next(iter(self._epochs))]

    def _doubts(self, listed: Listed, fates: Mapping[str, Fate]) -> list[Problem]:
        """Say why workers stay that are not listed."""
        kept = [name for name, fate in fates.items() if fate is Fate.STAY and name not in listed.members]
        if not kept:
            return []
        why = "the list of {} is empty" if not listed.members else "some of what is listed cannot be read"
        text = (
            f"{why.format('/'.join(self._key))}, so {len(kept)} that it lacks stay while they answer probes"
        )
        return [Problem("the list", text)]

    # --- what becomes of workers ----------------------------------------------------------------

    def _apply(self, name: str, fate: Fate) -> bool:
        """Do with a worker what was decided; return whether it leaves by that."""
        record = self._records[name]
        if fate is Fate.STAY and not (record.is_drained or record.is_removed):
            return False  # as nearly all of them do
        if record.is_dismissed and fate is not Fate.LOSE:
            return False
        if fate is Fate.LOSE:
            for worker in record.workers:
                self._registry.lose(worker, LOST)
            self._forget(name)
            return True
        if fate is Fate.REMOVE:
            return self._remove(record)
        self._stay(record)
        self._drain(record, is_wanted=fate is Fate.DRAIN)
        return False

    def _remove(self, record: _Record) -> bool:
        if record.is_removed:
            return False
        record.is_removed = True
        for worker in record.workers:
            self._registry.remove(worker)
        return True

    def _stay(self, record: _Record) -> None:
        """Have one stay that is listed again before it was forgotten."""
        if record.is_removed:
            record.is_removed = record.is_drained = False
            for worker in record.workers:
                self._registry.keep(worker)

    def _drain(self, record: _Record, *, is_wanted: bool) -> None:
        """Drain or undrain a worker as the source has it. What the operator has drained, stays drained."""
        if is_wanted and not any(worker.is_drained for worker in record.workers):
            record.is_drained = True
            for worker in record.workers:
                self._registry.drain(worker)
        elif record.is_drained and not is_wanted:
            record.is_drained = False
            for worker in record.workers:
                self._registry.undrain(worker)

    # --- who joins ------------------------------------------------------------------------------

    def _join(self, name: str, member: Member) -> None:
        """Raises `Conflict`; then no worker was added."""
        if not self._registry.has_room(self._options.data_parallel_size):
            raise Conflict("there is no room for it in shared memory: restart, or let others leave")
        epoch = self._epochs.get(name, 0)
        added: list[Worker] = []
        try:
            for address in self._addresses(member):
                added.append(self._registry.add(address, epoch))
        except Conflict:
            for worker in added:
                self._registry.lose(worker, LOST)
            raise
        self._records[name] = _Record(member, tuple(added))

    def _addresses(self, member: Member) -> tuple[WorkerAddress, ...]:
        options, (model, role) = self._options, self._key
        zone = member.zone or options.zone
        address = unmanaged(model, role, member.name, member.url, options.served_model, zone)
        return ranks_of(replace(address, is_discovered=True), options.data_parallel_size)


def _known(name: str, record: _Record) -> Known:
    member = record.member
    return Known(name, member.uid, member.url, _is_well(record.workers), record.is_drained)


def _is_well(workers: Iterable[Worker]) -> bool:
    for worker in workers:  # noqa: SIM110  # it is asked of each worker with each set
        if worker.state in IN_SERVICE:
            return True
    return False


def _is_leaving(workers: Iterable[Worker]) -> bool:
    for worker in workers:  # noqa: SIM110  # the same
        if worker.is_leaving:
            return True
    return False
