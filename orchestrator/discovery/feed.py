"""A feed follows one source: pools take each set, the source is asked again after pauses, trouble is told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import Final, NoReturn

from orchestrator.config.printing import one_line
from orchestrator.discovery.base import PoolKey, Source, SourceAway
from orchestrator.discovery.followed import FollowedPool
from orchestrator.discovery.listed import sort_out
from orchestrator.telemetry.events import Events
from orchestrator.wire.member import MemberSet, Problem
from orchestrator.workers.sources import SourceStatus

FIRST_PAUSE_S: Final = 0.2  # before a source that is away is asked again
LONGEST_PAUSE_S: Final = 5.0
LONGEST_WISH_S: Final = 30.0  # a source may ask to be left alone for longer, and is not
TELL_AGAIN_S: Final = 60.0  # another reason for which a source is away is told no sooner
MAX_TEXT: Final = 1000  # characters of a line: whoever writes the lists may have a part in it
MAX_NAMES: Final = 5  # in one line

_log = logging.getLogger("baton.discovery")


class Feed:
    """A feed has a source, and the pools whose workers that finds. Everything is on one event loop."""

    def __init__(
        self,
        name: str,
        source: Source,
        pools: Mapping[PoolKey, FollowedPool],
        others: Collection[PoolKey],
        events: Events,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is the source's, as `kubernetes team/qwen-decode`. `others` are pools whose members may be
        in the same list, and are found by other sources.
        """
        self._source = source
        self._pools = pools
        self._others = others
        self._events = events
        self._random = random
        self._clock = clock
        self._last: MemberSet | None = None
        self._pause_s = FIRST_PAUSE_S
        self._told_away: tuple[str, float] | None = None
        self.status = SourceStatus(name, tuple(pools), clock())

    async def run(self) -> NoReturn:
        """Follow the source until cancelled, whatever becomes of it."""
        while True:
            wish_s = 0.0
            try:
                await self._source.watch(self.take)
            except SourceAway as error:
                self._note_away(str(error))
                wish_s = min(error.retry_after_s, LONGEST_WISH_S)
            except Exception as error:  # a bug of ours must not end discovery for ever
                _log.exception("%s cannot be followed", self.status.name)
                self._note_away(f"{type(error).__name__}: {error}")
            await asyncio.sleep(max(self._pause_s * self._random.uniform(0.5, 1.0), wish_s))
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def take(self, found: MemberSet) -> None:
        """Have the pools take a set."""
        self._last = found
        self.status.since = self._clock()
        self._note_back()
        self._sort(found)

    def look_again(self) -> None:
        """Have the pools take the last set once more if something was wrong with it: what follows from that
        depends on who answers probes.
        """
        if self._last is not None and self.status.problems:
            self._sort(self._last)

    def _sort(self, found: MemberSet) -> None:
        known = {name: uid for pool in self._pools.values() for name, uid in pool.known().items()}
        listed = sort_out(found, tuple(self._pools), known, self._others)
        problems = [*listed.problems]
        for key, pool in self._pools.items():
            joined, left, more = pool.take(listed.pools[key])
            problems += more
            self._note_changes(key, joined, left)
        self.status.members = sum(len(pool.members) for pool in listed.pools.values())
        self._note_problems(problems)

    # --- what is told ---------------------------------------------------------------------------

    def _note_changes(self, key: PoolKey, joined: Sequence[str], left: Sequence[str]) -> None:
        parts = [*_named("join", joined), *_named("leave", left)]
        if parts:
            self._tell(logging.INFO, "discovery.changed", f"{'/'.join(key)}: {'; '.join(parts)}")

    def _note_problems(self, problems: Sequence[Problem]) -> None:
        """Tell of what is wrong, each thing once for as long as it is."""
        texts = tuple(dict.fromkeys(f"{problem.place}: {problem.reason}" for problem in problems))
        for text in texts:
            if text not in self.status.problems:
                self._tell(logging.WARNING, "discovery.problem", text)
        self.status.problems = texts

    def _note_away(self, why: str) -> None:
        self.status.away = why
        told = self._told_away
        if told is None or (told[0] != why and self._clock() >= told[1] + TELL_AGAIN_S):
            self._told_away = (why, self._clock())
            text = f"cannot be asked: {why}; the workers that were found stay"
            self._tell(logging.WARNING, "discovery.away", text)

    def _note_back(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        self.status.away = None
        if self._told_away is not None:
            self._told_away = None
            self._tell(logging.INFO, "discovery.back", "can be asked again")

    def _tell(self, level: int, kind: str, text: str) -> None:
        text = one_line(f"{self.status.name} {text}")[:MAX_TEXT]
        _log.log(level, "%s", text)
        self._events.note(kind, text, subject=self.status.name)


def _named(verb: str, names: Sequence[str]) -> list[str]:
    """Return what some workers do, naming the first of them."""
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"{len(names)} {verb} ({', '.join(names[:MAX_NAMES])}{more})"]
