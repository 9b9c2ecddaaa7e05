"""A worker that joins must fit those of its model that serve already; this decides who stays if it does not.

Workers that serve keep their place as long as they make a whole path, of prefill and decode: the newcomer is
refused. If they make none, and the newcomer does with those that were refused before, these replace them. So
one wrong worker that is up first keeps nobody out for long, and a change of settings takes no request away
from workers that serve. Workers that announce nothing fit everybody. Workers that serve alone hand nothing
over and are not compared. One that announces the other role of a pair than that of its pool is refused by
itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.wire.compatibility import (
    NO_CONNECTOR_ADVICE,
    OTHER_ROLE_ADVICE,
    Difference,
    differences,
    is_for,
    lacks_connector,
)
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.states import SERVING
from orchestrator.workers.worker import Worker

_PAIR = frozenset({"prefill", "decode"})


@dataclass(frozen=True, slots=True)
class Misfit:
    """A worker does not fit another one, and one of both must go."""

    worker: Worker  # who must go
    why: str  # for the operator: the values, and what to do
    reason: str  # for everybody: fixed words


def misfits(
    worker: Worker, others: Iterable[Worker], refused: Collection[Worker], *, within_revision: bool
) -> list[Misfit]:
    """Return who must go if `worker`, which is well and has announced itself, is to join: itself, or others.

    `others` are those of its model; those in `refused` are well, but were kept out before.
    `within_revision`: pairs are kept within one revision.
    """
    info = worker.introduction.info
    if info is None or worker.address.role not in _PAIR:
        return []
    if not is_for(info, worker.address.role):
        return [_of_other_role(worker, info)]
    if lacks_connector(info):
        return [Misfit(worker, f"it has no KV connector: {NO_CONNECTOR_ADVICE}", "has no KV connector")]
    comparison = _Comparison(within_revision)
    pairing = (other for other in others if other is not worker and other.address.role in _PAIR)
    peers = [other for other in pairing if _is_in_its_pool(other)]
    return comparison.misfits(worker, peers, refused)


def _of_other_role(worker: Worker, info: WorkerInfo) -> Misfit:
    role = worker.address.role
    advice = OTHER_ROLE_ADVICE.format(role=role)
    return Misfit(
        worker, f"it announces the role {info.role!r}, and its pool is {role!r}: {advice}", "has another role"
    )


def _is_in_its_pool(worker: Worker) -> bool:
    info = worker.introduction.info
    return info is None or is_for(info, worker.address.role)


def _is_whole(workers: Iterable[Worker]) -> bool:
    return {worker.address.role for worker in workers} == _PAIR


class _Comparison:
    def __init__(self, within_revision: bool) -> None:
        self._within_revision = within_revision

    def misfits(self, worker: Worker, peers: Sequence[Worker], refused: Collection[Worker]) -> list[Misfit]:
        serving = [other for other in peers if other.state in SERVING]
        rivals = [other for other in serving if not self._fit(worker, other)]
        if not rivals:
            return []
        theirs = [other for other in serving if all(self._fit(other, rival) for rival in rivals)]
        near = [other for other in peers if other in serving or other in refused]
        ours = [worker, *(other for other in near if self._fit(worker, other))]
        if not _is_whole(theirs) and _is_whole(ours):
            return [self._misfit(rival, worker) for rival in rivals]
        partners = [rival for rival in rivals if rival.address.role != worker.address.role]
        return [self._misfit(worker, (partners or rivals)[0])]

    def _fit(self, one: Worker, other: Worker) -> bool:
        return not self._differences(one, other)

    def _differences(self, one: Worker, other: Worker) -> Sequence[Difference]:
        mine, theirs = one.introduction.info, other.introduction.info
        if mine is None or theirs is None:
            return ()
        return differences(mine, theirs, within_revision=self._within_revision)

    def _misfit(self, worker: Worker, other: Worker) -> Misfit:
        found = self._differences(worker, other)
        fields = ", ".join(difference.field for difference in found)
        return Misfit(
            worker, "; ".join(_sentences(found, other)), f"does not fit the other workers ({fields})"
        )


def _sentences(found: Iterable[Difference], other: Worker) -> Iterator[str]:
    for difference in found:
        yield (
            f"its {difference.field} is {_shown(difference.mine)}, that of {other.name} is"
            f" {_shown(difference.theirs)}: {difference.advice}"
        )


def _shown(value: object) -> str:
    return f"{value!r:.80}"
