"""Simulated time goes by one decode step at a time for all running requests, and one prompt at a time."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

from worker.sim.latency import Latency

_STEPS_PER_TURN = 32  # without latency, so many tokens before other requests get a turn


class StepClock:
    """It makes decode steps. Everybody who waits when one ends gets a token; it is as long as the batch is
    large.
    """

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._waiting: list[asyncio.Future[None]] = []
        self._free_steps = 0

    async def wait_step(self, running: int, slow_factor: float = 1.0, kv_tokens: int = 0) -> None:
        """Wait for a step; `running` is the size of the batch, which has `kv_tokens` together. A slow request
        misses steps of its own.
        """
        length = self._latency.step_s(running, kv_tokens)
        if length == 0.0:
            await self._take_free_step()
            return
        if slow_factor > 1.0:
            await asyncio.sleep((slow_factor - 1.0) * length)
        await self._join_step(length)

    async def _join_step(self, length: float) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(length, self._end_step)
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def _end_step(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _take_free_step(self) -> None:
        self._free_steps += 1
        if self._free_steps % _STEPS_PER_TURN == 0:
            await asyncio.sleep(0)


class PrefillClock:
    """Prompts are computed one after the other: the lowest priority first, equals as they came."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._is_busy = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = count()

    async def compute(
        self, tokens: int, slow_factor: float = 1.0, cached: int = 0, priority: int = 0
    ) -> None:
        """Wait until a prompt of `tokens` is computed, of which a cache holds the first `cached`."""
        duration = self._latency.prefill_s(tokens, cached) * slow_factor
        if duration > 0.0:
            await self._begin(priority)
            try:
                await asyncio.sleep(duration)
            finally:
                self._end()

    async def _begin(self, priority: int) -> None:
        if not self._is_busy:
            self._is_busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was its turn
                self._end()
            raise

    def _end(self) -> None:
        """Let the next prompt begin; some have left meanwhile."""
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._is_busy = False
