"""When requests are sent: the schedule of an open loop, and a clock that keeps to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from random import Random

_LEAD_S = 0.01  # from making the clock to the schedule's zero


def arrivals(rate: float, duration_s: float, random: Random) -> list[float]:
    """Seconds from the start at which requests arrive, in order: `rate * duration_s` of them, at least one.

    Moments drawn uniformly are a Poisson process whose number of arrivals is known: the bursts are those of
    independent clients, but every seed asks for the same load.
    """
    count = max(1, round(rate * duration_s))
    return sorted(random.uniform(0.0, duration_s) for _ in range(count))


async def keep(schedule: Sequence[float], send: Callable[[int, float], object]) -> None:
    """Call `send(index, due)` on the event loop at each moment of the schedule; returns after the last call.

    `due` is the moment as `time.perf_counter()`; how late the call comes is the client's own lateness. A
    thread keeps the time, for the event loop's timers know whole milliseconds only. Cancelling ends it.
    """
    loop = asyncio.get_running_loop()
    is_over = threading.Event()
    start = time.perf_counter() + _LEAD_S

    def call(index: int, due: float) -> None:
        if not is_over.is_set():
            send(index, due)

    def watch_the_clock() -> None:
        for index, moment in enumerate(schedule):
            due = start + moment
            if is_over.wait(max(0.0, due - time.perf_counter())):
                return
            loop.call_soon_threadsafe(call, index, due)

    try:
        await asyncio.to_thread(watch_the_clock)
    finally:
        is_over.set()
