"""What a set of members changes about the workers of a pool is decided here, from plain data.

| a worker that is there | becomes of it |
|---|---|
| listed under its uid | stays; drains while the source says that it drains, or does not serve |
| listed under its name with another uid or URL | lost: that start of it is over |
| not listed, and its URL is that of another one | lost |
| not listed | removed: no new legs, legs under way go on, then it is forgotten |
| not listed, as nothing is, or what is listed cannot be read | stays while its probes are well |

A member that is not there joins, unless it drains or does not serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from orchestrator.discovery.listed import Listed
from orchestrator.wire.member import Member


class Fate(Enum):
    STAY = auto()
    DRAIN = auto()  # stay, without new legs
    REMOVE = auto()
    LOSE = auto()


class Known(msgspec.Struct, frozen=True):  # one is made for each worker with each set
    """A worker that was taken from a source is known by this."""

    name: str
    uid: str
    url: str
    is_well: bool  # its last probes were answered
    is_drained: bool = False  # as the source has said that it drains


@dataclass(frozen=True, slots=True)
class Changes:
    fates: Mapping[str, Fate]  # of all that are known, by name
    joining: Sequence[tuple[str, Member]]  # with their names


def decide(listed: Listed, known: Sequence[Known]) -> Changes:
    """Return what becomes of the workers of a pool, and who joins them."""
    has_serving = any(_serves(member) for member in listed.members.values())
    owners = {member.url: name for name, member in listed.members.items()}
    fates = {worker.name: _fate(worker, listed, owners, has_serving) for worker in known}
    staying = {worker.name for worker in known if fates[worker.name] in (Fate.STAY, Fate.DRAIN)}
    joining = [
        (name, member) for name, member in listed.members.items() if name not in staying and _serves(member)
    ]
    return Changes(fates, joining)


def _serves(member: Member) -> bool:
    return member.is_ready and not member.is_draining


def _fate(worker: Known, listed: Listed, owners: Mapping[str, str], has_serving: bool) -> Fate:
    member = listed.members.get(worker.name)
    if member is None:
        return _fate_of_missing(worker, listed, owners)
    if (member.uid, member.url) != (worker.uid, worker.url):
        return Fate.LOSE
    # If none is said to serve, that is more likely said wrongly than that all have failed at once.
    is_out = member.is_draining or (not member.is_ready and has_serving)
    return Fate.DRAIN if is_out else Fate.STAY


def _fate_of_missing(worker: Known, listed: Listed, owners: Mapping[str, str]) -> Fate:
    if worker.url in owners:
        return Fate.LOSE
    if worker.name in listed.unreadable:
        return Fate.STAY
    is_doubtful = not listed.members or not listed.is_whole
    if is_doubtful and worker.is_well and not worker.is_drained:
        return Fate.STAY
    return Fate.REMOVE
