"""What the load wants is done here: workers are started and stopped as the orchestrator's planner says.

Each that comes or goes is waited for by itself, so that one which does not get ready holds up nobody. Of a
pool one goes at a time, when its last request has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
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
FIRST_PAUSE_S: Final = 10.0  # after a start, or a stop, that failed; it doubles
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
        self._coming = _Moves()
        self._going = _Moves()
        self._complaint = ""  # that was said last
        fleet.scaled = pools

    async def run(self) -> None:
        """Follow until cancelled. Who is not ready then is stopped; who was to go stays."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                if self._pools:
                    await self.look()
        finally:
            for moves in (self._coming, self._going):
                for member in moves.tasks:
                    moves.give_up(member)
            tasks = [*self._coming.tasks.values(), *self._going.tasks.values()]
            await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Begin with what is wanted now; nothing, while an operator's command is under way."""
        if not self._is_free():
            return
        try:
            wishes = await self._registrar.wanted()
        except CommandFailed as error:
            self._complain(str(error))
            return
        self._complaint = ""
        for wish in wishes:
            is_ours = (wish.model, wish.role) in self._pools
            if is_ours and self._is_free():  # a command may have come meanwhile
                await self._follow(wish)

    def _is_free(self) -> bool:
        return self._fleet.is_ready and self._fleet.operation is None

    async def _follow(self, wish: Wanted) -> None:
        key = wish.model, wish.role
        there = [
            member
            for member in self._fleet.workers
            if pool_of(member.spec.name) == key
            and member not in self._going.tasks
            and member not in self._coming.given_up
        ]
        with self._claimed("/".join(key)):
            if len(there) < wish.count:
                await self._grow(key, wish.count - len(there), wish.why)
            elif len(there) > wish.count:
                await self._shrink(there, key, wish.why)

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """Have commands refused until the block ends."""
        self._fleet.moving.add(name)
        try:
            yield
        finally:
            self._fleet.moving.discard(name)

    async def _grow(self, key: Key, count: int, why: str) -> None:
        if self._coming.is_paused(key):
            return
        self._say(f"{'/'.join(key)}: {count} more: {why}")
        for _ in range(count):
            try:
                member = await self._operator.add(*key, self._order)
            except (PlanError, CommandFailed, StartFailed, OSError) as error:
                self._pause(self._coming, key, str(error))
                return
            await self._watch(self._coming, member, self._operator.wait_up(member, self._order))

    async def _shrink(self, there: list[Member], key: Key, why: str) -> None:
        """Stop one: the last that is not ready yet, or else that which is missed least."""
        coming = [member for member in there if member in self._coming.tasks]
        if coming:
            self._coming.give_up(coming[-1])
            return
        if self._going.has(key) or self._going.is_paused(key):
            return
        try:
            member = (await self._operator.dispensable(there))[0]
        except CommandFailed as error:
            self._complain(str(error))
            return
        self._say(f"{member.spec.name} goes: {why}")
        await self._watch(self._going, member, self._operator.retire(member, self._order))

    async def _watch(self, moves: _Moves, member: Member, move: Coroutine[Any, Any, None]) -> None:
        self._fleet.moving.add(member.spec.name)
        moves.tasks[member] = asyncio.create_task(self._moved(moves, member, member.spec.name, move))
        await asyncio.sleep(0)  # a task that was cancelled before it began would clean up nothing

    async def _moved(self, moves: _Moves, member: Member, name: str, move: Coroutine[Any, Any, None]) -> None:
        key = pool_of(name)
        try:
            await move
            moves.resume(key)
        except (CommandFailed, StartFailed) as error:
            self._pause(moves, key, str(error))
        finally:
            moves.forget(member)
            self._fleet.moving.discard(name)
            self._fleet.note()

    def _pause(self, moves: _Moves, key: Key, why: str) -> None:
        self._say(f"{'/'.join(key)}: {why}; another try in {moves.pause(key):.0f} s")

    def _complain(self, why: str) -> None:
        if why != self._complaint:
            self._complaint = why
            self._say(f"nobody knows how many workers are wanted: {why}")


class _Moves:
    """These workers are being started, or stopped. Where one has failed none follows for a while: it would
    most probably fail again.
    """

    def __init__(self) -> None:
        self.tasks: dict[Member, asyncio.Task[None]] = {}
        self.given_up: set[Member] = set()  # whose tasks end; a second cancellation would cut that short
        self._pauses: dict[Key, tuple[float, float]] = {}  # until when, and for how long

    def has(self, key: Key) -> bool:
        return any(pool_of(member.spec.name) == key for member in self.tasks)

    def give_up(self, member: Member) -> None:
        if member not in self.given_up:
            self.given_up.add(member)
            self.tasks[member].cancel()

    def forget(self, member: Member) -> None:
        del self.tasks[member]
        self.given_up.discard(member)

    def is_paused(self, key: Key) -> bool:
        return key in self._pauses and _now() < self._pauses[key][0]

    def pause(self, key: Key) -> float:
        """Return for how many seconds none follows; what failed together counts once."""
        until, pause_s = self._pauses.get(key, (0.0, 0.0))
        if _now() < until:
            return until - _now()
        pause_s = min(2 * pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._pauses[key] = _now() + pause_s, pause_s
        return pause_s

    def resume(self, key: Key) -> None:
        self._pauses.pop(key, None)


def _unsaid(_: str) -> None:
    """Say nothing: what happens is seen where the run shows how it goes."""


def _now() -> float:
    return asyncio.get_running_loop().time()
