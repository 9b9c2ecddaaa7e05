"""Workers are sorted by the revision of the model that they have announced, unless `routing.pair` is any."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker


class Group:
    """The decode workers have one revision, and the prefill workers go with it; there are some of both."""

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
        self._pairs_unknown = False

    def pair_unknown(self, pairs_unknown: bool) -> None:
        """Let a worker without a revision go with one of any from now on, or only with others without."""
        if pairs_unknown is not self._pairs_unknown:
            self._pairs_unknown = pairs_unknown
            self._prefill = self._decode = ()

    def groups(self, prefill: Sequence[Worker], decode: Sequence[Worker]) -> list[Group]:
        """Return the groups of workers that can be pairs, in the order of the decode workers. Tuples of
        workers must not change.
        """
        if prefill is not self._prefill or decode is not self._decode:
            self._prefill, self._decode = prefill, decode
            self._groups = _groups(prefill, decode, self._pairs_unknown)
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

    def go_together(self, prefill: Worker, decode: Worker) -> bool:
        """Tell whether a hand-off of the one may go to the other."""
        return goes_with(prefill.revision, decode.revision, self._pairs_unknown)

    def strangers(
        self, revision: str | None, pools: Pools, failed: Collection[Worker], *, needs_pair: bool
    ) -> tuple[Worker, ...]:
        """Return the workers that do not go with this revision; none if no others can serve a request that
        `failed` have failed: two of them, or one, unless that `needs_pair`.
        """
        fit = [w for w in (*pools.prefill, *pools.decode, *pools.both) if self._goes(w, revision)]
        roles = {worker.address.role for worker in fit if worker not in failed}
        has_pair = "decode" in roles and (not needs_pair or "prefill" in roles)
        if not has_pair and "both" not in roles:
            return ()
        return tuple([w for w in (*pools.prefill, *pools.decode, *pools.both) if w not in fit])

    def _goes(self, worker: Worker, revision: str | None) -> bool:
        return goes_with(worker.revision, revision, self._pairs_unknown)

    def decodes(self) -> tuple[Worker, ...]:
        """Return the decode workers of all groups."""
        return self._decodes


def _are_one(workers: Sequence[Worker], revision: str | None) -> bool:
    for worker in workers:  # noqa: SIM110  # it is made for each request while workers warm up
        if worker.revision != revision:
            return False
    return True


def _groups(prefill: Sequence[Worker], decode: Sequence[Worker], pairs_unknown: bool) -> list[Group]:
    found: list[Group] = []
    for revision, workers in _by_revision(decode).items():
        partners = [worker for worker in prefill if goes_with(worker.revision, revision, pairs_unknown)]
        if partners:
            found.append(Group(revision, tuple(partners), tuple(workers)))
    return found


def goes_with(one: str | None, other: str | None, pairs_unknown: bool) -> bool:
    """Tell whether a hand-off may go between workers of these revisions; see `Revisions.pair_unknown`."""
    return one == other or (pairs_unknown and (one is None or other is None))


def _by_revision(workers: Sequence[Worker]) -> dict[str | None, list[Worker]]:
    found: dict[str | None, list[Worker]] = {}
    for worker in workers:
        found.setdefault(worker.revision, []).append(worker)
    return found
