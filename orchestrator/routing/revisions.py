"""Workers are sorted by the revision of the model that they have announced, for `pair: same_revision`."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.workers.worker import Worker


class Group:
    """These workers have the same revision; there are some of both roles."""

    __slots__ = ("decode", "prefill", "revision")

    def __init__(self, revision: str | None, prefill: Sequence[Worker], decode: Sequence[Worker]) -> None:
        self.revision = revision
        self.prefill = prefill
        self.decode = decode


class Revisions:
    """It remembers the last answer, for workers mostly stay the same."""

    def __init__(self) -> None:
        self._prefill: Sequence[Worker] = ()
        self._decode: Sequence[Worker] = ()
        self._groups: list[Group] = []
        self._decodes: tuple[Worker, ...] = ()  # of all groups
        self._asked: tuple[Sequence[Worker], Sequence[Worker]] = ((), ())  # whether these are one
        self._is_one = True

    def groups(self, prefill: Sequence[Worker], decode: Sequence[Worker]) -> list[Group]:
        """Return the groups of workers that can be pairs, in the order of the decode workers. Tuples of
        workers must not change.
        """
        if prefill is not self._prefill or decode is not self._decode:
            self._prefill, self._decode = prefill, decode
            self._groups = _groups(prefill, decode)
            self._decodes = tuple([worker for group in self._groups for worker in group.decode])
        return self._groups

    def are_one(self, prefill: Sequence[Worker], decode: Sequence[Worker]) -> bool:
        """Tell whether all of them have the same revision, as they mostly do. Tuples of workers must not
        change.
        """
        if prefill is not self._asked[0] or decode is not self._asked[1]:
            self._asked = (prefill, decode)
            self._is_one = _are_one(prefill, decode[0].revision) and _are_one(decode, decode[0].revision)
        return self._is_one

    def decodes(self) -> tuple[Worker, ...]:
        """Return the decode workers of all groups."""
        return self._decodes


def _are_one(workers: Sequence[Worker], revision: str | None) -> bool:
    for worker in workers:  # noqa: SIM110  # it is made for each request while workers warm up
        if worker.revision != revision:
            return False
    return True


def _groups(prefill: Sequence[Worker], decode: Sequence[Worker]) -> list[Group]:
    firsts, seconds = _by_revision(prefill), _by_revision(decode)
    return [
        Group(revision, tuple(firsts[revision]), tuple(workers))
        for revision, workers in seconds.items()
        if revision in firsts
    ]


def _by_revision(workers: Sequence[Worker]) -> dict[str | None, list[Worker]]:
    found: dict[str | None, list[Worker]] = {}
    for worker in workers:
        found.setdefault(worker.revision, []).append(worker)
    return found
