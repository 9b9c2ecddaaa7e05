"""What a source lists is checked here: members that cannot be workers of ours are named, and left out.

This is pure: the same set, and the same members known before, always have the same outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from orchestrator.config.options import Url
from orchestrator.discovery.base import PoolKey
from orchestrator.wire.member import MAX_MEMBERS, Member, MemberSet, Problem

_url: Final[TypeAdapter[str]] = TypeAdapter(Url)
MAX_ROWS: Final = 100  # problems of one set that are told


@dataclass(frozen=True, slots=True)
class Listed:
    """A source lists these members of one pool."""

    members: Mapping[str, Member] = field(default_factory=dict)  # by the name of the worker, MODEL/ROLE/NAME
    unreadable: AbstractSet[str] = frozenset()  # names of workers whose entries cannot be used
    is_whole: bool = True  # there are no entries of which nobody can say whose they are


@dataclass(frozen=True, slots=True)
class Sorted:
    """A set is sorted into the pools that its source is for."""

    pools: Mapping[PoolKey, Listed]
    problems: tuple[Problem, ...]


def worker_name(member: Member) -> str:
    return f"{member.model}/{member.role}/{member.name}"


def sort_out(
    found: MemberSet, pools: Sequence[PoolKey], known: Mapping[str, str], others: Iterable[PoolKey] = ()
) -> Sorted:
    """Sort a set into pools. `known` has the uid of each worker that was taken before, by its name: where two
    members cannot both be right, that one stays. `others` are pools of the config whose members may be in the
    same set, and are somebody else's.
    """
    problems = [*found.problems]
    ours = [*_of_pools(found.members, pools, frozenset(others), problems)]
    checked = [*_with_urls(ours, problems)]
    chosen = checked if _are_distinct(checked) else _told_apart(checked, known, problems)
    unreadable = {"/".join(problem.key) for problem in problems if problem.key is not None}
    return Sorted(
        {pool: _listed(pool, chosen, unreadable, found) for pool in pools}, tuple(problems[:MAX_ROWS])
    )


def _listed(
    pool: PoolKey, chosen: Sequence[Member], unreadable: AbstractSet[str], found: MemberSet
) -> Listed:
    members = {worker_name(member): member for member in chosen if (member.model, member.role) == pool}
    prefix = "/".join(pool) + "/"
    of_pool = {name for name in unreadable if name.startswith(prefix)} - members.keys()
    return Listed(members, frozenset(of_pool), found.is_whole)


def _of_pools(
    members: Iterable[Member], pools: Sequence[PoolKey], others: AbstractSet[PoolKey], problems: list[Problem]
) -> Iterator[Member]:
    for member in members:
        key: PoolKey = (member.model, member.role)
        if key in pools:
            yield member
        elif key not in others:
            there = ", ".join("/".join(pool) for pool in pools)
            why = f"no pool {member.model}/{member.role} is found by this source; there is: {there}"
            problems.append(Problem(_place(member), why))


def _with_urls(members: Iterable[Member], problems: list[Problem]) -> Iterator[Member]:
    """Yield the members with their URLs as the config would have them."""
    for member in members:
        url, why = _checked_url(member.url)
        if why:
            problems.append(Problem(_place(member), f"its url is wrong: {why}", _key(member)))
        else:
            yield member if url == member.url else msgspec.structs.replace(member, url=url)


@lru_cache(MAX_MEMBERS)
def _checked_url(value: str) -> tuple[str, str]:
    """Return a URL as the config has it, or else why it is none."""
    try:
        return _url.validate_python(value), ""
    except ValidationError as error:
        return "", error.errors()[0]["msg"].removeprefix("Value error, ")


def _are_distinct(members: Sequence[Member]) -> bool:
    """Tell whether no two have the same name, the same uid in a pool or the same URL in a model.

    They mostly have not, and a set may have thousands, so this is told without looking at each by itself.
    """
    names = {(member.model, member.role, member.name) for member in members}
    uids = {(member.model, member.role, member.uid) for member in members}
    urls = {(member.model, member.url) for member in members}
    return len(names) == len(uids) == len(urls) == len(members)


def _told_apart(
    members: Iterable[Member], known: Mapping[str, str], problems: list[Problem]
) -> Sequence[Member]:
    """Return those that count where two are alike: one that stays before one that leaves, then who is
    known.
    """

    def rank(member: Member) -> tuple[bool, bool]:
        return member.is_draining, known.get(worker_name(member)) != member.uid

    return [*_single(sorted(members, key=rank), problems)]


def _single(members: Iterable[Member], problems: list[Problem]) -> Iterator[Member]:
    """Yield members of which no two have the same name, the same uid in a pool or the same URL in a model."""
    taken: dict[tuple[str, ...], Member] = {}
    for member in members:
        names = {
            "name": ("name", worker_name(member)),
            "uid": ("uid", member.model, member.role, member.uid),
            "url": ("url", member.model, member.url),
        }
        clash = next((what for what, name in names.items() if name in taken), None)
        if clash is None:
            taken.update(dict.fromkeys(names.values(), member))
            yield member
        elif not member.is_draining:  # one that leaves may still be listed beside the one that follows it
            other = taken[names[clash]]
            why = f"it has the {clash} {getattr(member, clash)!r} of {worker_name(other)}, which is used"
            problems.append(Problem(_place(member), why))


def _place(member: Member) -> str:
    return f"{worker_name(member)} (uid {member.uid})"


def _key(member: Member) -> tuple[str, str, str]:
    return member.model, member.role, member.name
