"""What the load wants is done here: workers are started and stopped as the orchestrator's planner says.

Each that comes or goes is waited for by itself, so that one which does not get ready holds up nobody. Of a
pool one goes at a time, when its last request has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from launch.engines.base import PlanError
from launch.local.control import CommandFailed
from launch.local.fleet import Fleet
from launch.local.further import pool_of
from launch.local.member import Member, StartFailed
from launch.local.operations import Operator
from launch.local.order import Nobody, Order
from launch.local.registrar import Registrar, Wanted

LOOK_S: Final = 2.0
DRAIN_S: Final = 3600.0  # for the requests of a worker to end; if they do not it goes on to serve
FIRST_PAUSE_S: Final = 10.0  # after a start that failed; it doubles
LONGEST_PAUSE_S: Final = 600.0

Key = tuple[str, str]  # model, role


class Scaling:
    """It has the pools in its charge whose `replicas` are a range."""

    def __init__(
        self,
        fleet: Fleet,
        operator: Operator,
        registrar: Registrar,
        pools: Collection[Key],
        say: Callable[[str], None],
    ) -> None:
        self._fleet = fleet
        self._operator = operator
        self._registrar = registrar
        self._pools = pools
        self._say = say
        self._order = Order(Nobody(_unsaid), DRAIN_S, is_forced=False)
        self._coming: dict[Member, asyncio.Task[None]] = {}
        self._going: dict[Member, asyncio.Task[None]] = {}
        self._pauses: dict[Key, tuple[float, float]] = {}  # until when nothing is started, and for how long
        self._complaint = ""  # that was said last
        fleet.scaled = pools

    async def run(self) -> None:
        """Follow until cancelled. Who is not ready then is stopped; who was to go stays."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                if self._pools:
                    await self._look()
        finally:
            tasks = [*self._coming.values(), *self._going.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        if not self._fleet.is_ready or self._fleet.operation is not None:
            return
        try:
            wishes = await self._registrar.wanted()
        except CommandFailed as error:
            self._complain(str(error))
            return
        self._complaint = ""
        for wish in wishes:
            if (wish.model, wish.role) in self._pools:
                await self._follow(wish)

    async def _follow(self, wish: Wanted) -> None:
        key = wish.model, wish.role
        there = [
            member
            for member in self._fleet.workers
            if pool_of(member.spec.name) == key and member not in self._going
        ]
        if len(there) < wish.count:
            await self._grow(key, wish.count - len(there), wish.why)
        elif len(there) > wish.count:
            await self._shrink(there, key, wish.why)

    async def _grow(self, key: Key, count: int, why: str) -> None:
        until, _ = self._pauses.get(key, (0.0, 0.0))
        if _now() < until:
            return
        self._say(f"{'/'.join(key)}: {count} more: {why}")
        for _ in range(count):
            try:
                member = await self._operator.add(*key, self._order)
            except (PlanError, CommandFailed, StartFailed) as error:
                self._pause(key, str(error))
                return
            self._watch(self._coming, member, self._operator.wait_up(member, self._order))

    async def _shrink(self, there: list[Member], key: Key, why: str) -> None:
        """Stop one: the last that is not ready yet, or else that which is missed least."""
        coming = [member for member in there if member in self._coming]
        if coming:
            self._coming[coming[-1]].cancel()
            return
        if any(pool_of(member.spec.name) == key for member in self._going):
            return
        try:
            member = (await self._operator.dispensable(there))[0]
        except CommandFailed as error:
            self._complain(str(error))
            return
        self._say(f"{member.spec.name} goes: {why}")
        self._watch(self._going, member, self._operator.retire(member, self._order))

    def _watch(
        self, moves: dict[Member, asyncio.Task[None]], member: Member, move: Coroutine[Any, Any, None]
    ) -> None:
        self._fleet.moving.add(member.spec.name)
        moves[member] = asyncio.create_task(self._moved(moves, member, member.spec.name, move))

    async def _moved(
        self,
        moves: dict[Member, asyncio.Task[None]],
        member: Member,
        name: str,
        move: Coroutine[Any, Any, None],
    ) -> None:
        key = pool_of(name)
        try:
            await move
            self._pauses.pop(key, None)
        except (CommandFailed, StartFailed) as error:
            self._pause(key, str(error))
        finally:
            del moves[member]
            self._fleet.moving.discard(name)
            self._fleet.note()

    def _pause(self, key: Key, why: str) -> None:
        """Start nothing for a while: it would most probably fail again."""
        _, before = self._pauses.get(key, (0.0, 0.0))
        pause_s = min(2 * before or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._pauses[key] = _now() + pause_s, pause_s
        self._say(f"{'/'.join(key)}: {why}; another try in {pause_s:.0f} s")

    def _complain(self, why: str) -> None:
        if why != self._complaint:
            self._complaint = why
            self._say(f"nobody knows how many workers are wanted: {why}")


def _unsaid(_: str) -> None:
    """Say nothing: what happens is seen where the run shows how it goes."""


def _now() -> float:
    return asyncio.get_running_loop().time()
