"""Operations wait here for processes, and for what orchestrators make of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from launch.local.control import CommandFailed
from launch.local.fleet import Fleet
from launch.local.member import Member
from launch.local.order import Order, check_wanted
from launch.local.registrar import Registrar, Row
from orchestrator.config.printing import counted

POLL_S: Final = 0.1
# A decode worker pulls the KV cache of a prefill that has just ended; it begins with that at once.
PULLED_S: Final = 1.0
KNOWN_S: Final = 10.0  # until the orchestrators have noticed that a worker is gone


class Waits:
    """What does not come in its time is a `CommandFailed`."""

    def __init__(self, fleet: Fleet, registrar: Registrar) -> None:
        self._fleet = fleet
        self._registrar = registrar

    async def until_serving(self, member: Member) -> None:
        """Wait until an orchestrator has found its workers, and a balancer it, if others serve meanwhile."""
        if len(self._fleet.orchestrators) > 1:
            await self._until_up(member, lambda: self._registrar.is_serving(member.spec.url))
            await asyncio.sleep(self._fleet.limits.notice_s)  # else a balancer may know of none for a moment

    async def rows_of(self, member: Member) -> Sequence[Row]:
        """Return what the orchestrator knows of a worker: a row for each of its engines."""
        place = member.spec.role, member.spec.url
        return [row for row in await self._registrar.rows() if (row.role, row.url) == place]

    async def until_free(self, member: Member, order: Order) -> None:
        """Wait until a worker, which is drained, serves no request. Raises `CommandFailed` if that takes too
        long, unless requests may fail.
        """
        told = None
        try:
            async with asyncio.timeout(order.timeout_s):
                while told := sum(row.in_flight for row in await self.rows_of(member)):
                    check_wanted(order)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            if not order.is_forced:
                requests = counted(told or 0, "request")
                raise CommandFailed(
                    f"{member.spec.name} still serves {requests} after {order.timeout_s:g} s, and goes "
                    "on with them; --force cuts them, --timeout-s gives them more time"
                ) from None
            order.caller.say(f"{member.spec.name} is stopped, which cuts {counted(told or 0, 'request')}")
            return
        if member.spec.role != "decode":
            await asyncio.sleep(PULLED_S)

    async def until_known_gone(self, member: Member) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S):
                await until(lambda: self._is_known_gone(member))

    async def _is_known_gone(self, member: Member) -> bool:
        return all(row.state != "draining" for row in await self.rows_of(member))

    async def until_started(self, member: Member) -> None:
        await self._until_up(member, lambda: _is_started(member))

    async def _until_up(self, member: Member, is_so: Callable[[], Awaitable[bool]]) -> None:
        limit_s = self._fleet.limits.start_s
        try:
            async with asyncio.timeout(limit_s):
                await until(is_so)
        except TimeoutError:
            raise CommandFailed(f"{member.spec.name} is not ready after {limit_s:g} s") from None

    async def until_in_service(self, member: Member) -> None:
        """Wait until the orchestrator lets a worker serve, unless somebody has drained it before."""
        try:
            async with asyncio.timeout(self._fleet.limits.start_s):
                await until(lambda: self._is_in_service(member))
        except TimeoutError:
            rows = await self.rows_of(member)
            why = next((row.last_error for row in rows if row.last_error), "it does not say why")
            raise CommandFailed(f"the orchestrator does not let {member.spec.name} serve: {why}") from None

    async def _is_in_service(self, member: Member) -> bool:
        member.check_started()
        rows = await self.rows_of(member)
        is_known = bool(rows) or not self._registrar.is_discovering
        return is_known and all(row.state == "ready" or row.is_drained for row in rows)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    while not await is_so():  # noqa: ASYNC110  # nobody tells of it unasked
        await asyncio.sleep(POLL_S)


async def _is_started(member: Member) -> bool:
    member.check_started()
    return member.is_ready
