"""`baton discover` asks the sources of a config who is there, as an orchestrator would, and shows it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from launch.exits import Exit

if TYPE_CHECKING:
    import asyncio

    from orchestrator.config.options import Config, DiscoverConfig
    from orchestrator.discovery.base import PoolKey
    from orchestrator.wire.member import Member, MemberSet

ABOUT: Final = "ask the sources of CONFIG which workers there are, and show them and what is wrong"
HEADER: Final = ("worker", "state", "url", "zone", "revision", "uid")

Document = Mapping[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    from launch.arguments import seconds

    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="default: %(default)s"
    )
    parser.add_argument(
        "--timeout-s",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long a source may take; default: %(default)g",
    )


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Print what each source lists; fails if one cannot be asked, or something in it cannot be used."""
    import asyncio

    from orchestrator.config.printing import one_line

    found = asyncio.run(ask(config, arguments.timeout_s))
    if not found:
        print(f"{one_line(arguments.config)}: no pool says discover", file=sys.stderr)
    elif arguments.output == "json":
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(map(one_line, shown(found))))
    is_well = all(source["away"] is None and not source["problems"] for source in found)
    return Exit.OK if found and is_well else Exit.FAILED


# --- asking -------------------------------------------------------------------------------------


async def ask(config: Config, timeout_s: float) -> list[Document]:
    """Return what each source lists first, or why it lists nothing."""
    import asyncio

    from orchestrator.discovery.discovery import sources_of

    wanted = sources_of(config)
    everybody = {pool for pools in wanted.values() for pool in pools}
    asked = (_asked(source, pools, everybody - set(pools), timeout_s) for source, pools in wanted.items())
    return await asyncio.gather(*asked)


async def _asked(
    discover: DiscoverConfig, pools: Sequence[PoolKey], others: set[PoolKey], timeout_s: float
) -> Document:
    from orchestrator.discovery.listed import sort_out

    found, away = await _first_set(discover, pools, timeout_s)
    head = {"name": discover.name, "pools": ["/".join(pool) for pool in pools], "away": away}
    if found is None:
        return {**head, "members": [], "problems": []}
    listed = sort_out(found, pools, {}, others)
    members = [
        _described(name, member) for pool in listed.pools.values() for name, member in pool.members.items()
    ]
    problems = [f"{problem.place}: {problem.reason}" for problem in listed.problems]
    return {**head, "members": sorted(members, key=lambda one: str(one["worker"])), "problems": problems}


async def _first_set(
    discover: DiscoverConfig, pools: Sequence[PoolKey], timeout_s: float
) -> tuple[MemberSet | None, str | None]:
    """Return what a source lists first, or else why it cannot be asked."""
    import asyncio
    from random import Random

    from orchestrator.discovery import SOURCES
    from orchestrator.discovery.base import SourceAway

    sets: list[MemberSet] = []
    has_set = asyncio.Event()

    def take(found: MemberSet) -> None:
        sets.append(found)
        has_set.set()

    source = SOURCES[discover.kind](discover, pools, Random())  # noqa: S311  # jitter
    watching, waiting = asyncio.ensure_future(source.watch(take)), asyncio.ensure_future(has_set.wait())
    both: set[asyncio.Future[Any]] = {watching, waiting}
    await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in both:
        task.cancel()
    why, _ = await asyncio.gather(watching, waiting, return_exceptions=True)
    if sets:
        return sets[0], None
    return None, str(why) if isinstance(why, SourceAway) else f"it has not answered in {timeout_s:g} s"


def _described(name: str, member: Member) -> Document:
    state = "drains" if member.is_draining else "serves" if member.is_ready else "not ready"
    return {
        "worker": name,
        "state": state,
        "url": member.url,
        "zone": member.zone,
        "revision": member.revision,
        "uid": member.uid,
    }


# --- showing ------------------------------------------------------------------------------------


def shown(found: Sequence[Document]) -> Iterator[str]:
    """Yield the lines of a table for each source."""
    for index, source in enumerate(found):
        if index:
            yield ""
        yield f"{source['name']}: for {', '.join(source['pools'])}"
        if source["away"] is not None:
            yield f"  cannot be asked: {source['away']}"
            continue
        yield from _rows(source["members"])
        yield from (f"  wrong: {problem}" for problem in source["problems"])


def _rows(members: Sequence[Document]) -> Iterator[str]:
    if not members:
        yield "  no workers"
        return
    rows = [
        [head.upper() for head in HEADER],
        *([member[head] or "" for head in HEADER] for member in members),
    ]
    used = [place for place in range(len(HEADER)) if any(row[place] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in used}
    for row in rows:
        yield f"  {'  '.join(row[place].ljust(widths[place]) for place in used)}".rstrip()
