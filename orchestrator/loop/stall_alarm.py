"""The stall alarm says which callback held the event loop up for too long, or that the machine did.

The loop cannot tell by itself while it is held up, so a thread watches a heartbeat. It wakes a few times a
second and looks at a few numbers; only during a stall does it look at the loop's stack.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from dataclasses import dataclass

BEAT_S = 0.05
_MOST = 0.8  # of a stall: a thread that is late by less may have been so for other reasons
_FRAMES = 8  # of the stack, the innermost

_log = logging.getLogger("baton.loop")


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample is what the system has told at one moment of the loop's thread, in seconds."""

    moment: float
    overslept_s: float  # the thread that watches has woken so much later than it had asked for, in all
    ran_s: float  # the loop's thread has had the CPU for so long, ever
    waited_s: float  # it was ready to run, and had no CPU


def missed(before: Sample, now: Sample) -> float:
    """Return for how many seconds between two samples the loop's thread was not let run; 0.0 if that is not
    why it stood still.

    A wait that is not over is counted nowhere yet, nor is a pause of the process; but then the thread that
    watches is as late. It is late too while the loop's thread computes and holds the interpreter's lock.
    """
    window_s = now.moment - before.moment
    waited_s, late_s = now.waited_s - before.waited_s, now.overslept_s - before.overslept_s
    if now.ran_s - before.ran_s >= window_s / 2:
        return 0.0
    if waited_s >= window_s / 2:
        return waited_s
    return late_s if late_s >= _MOST * window_s else 0.0


def _scheduled(native_id: int) -> tuple[float, float]:
    """Return how long a thread of ours has run, and waited for a CPU, in seconds; 0 where nobody tells."""
    try:
        with open(f"/proc/self/task/{native_id}/schedstat", encoding="ascii") as file:
            ran_ns, waited_ns, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0.0, 0.0
    return ran_ns / 1e9, waited_ns / 1e9


class StallAlarm:
    """The alarm warns once for every stall longer than `limit_s`, with the stack as it was then.

    Start it in the thread of a running event loop; `stop` ends the thread.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop_thread = threading.get_ident()
        self._native_id = threading.get_native_id()
        self._beat = time.monotonic()  # written by the loop, read by the thread
        self._is_stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._watch, name="stall-alarm", daemon=True)

    def start(self) -> None:
        self._pulse(asyncio.get_running_loop())
        self._thread.start()

    def stop(self) -> None:
        """Stop the alarm. This can be repeated."""
        self._is_stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _pulse(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat = time.monotonic()
        self._timer = loop.call_later(BEAT_S, self._pulse, loop)

    def _watch(self) -> None:
        reported = seen = 0.0
        overslept_s = 0.0
        pause_s = self._limit_s / 4
        before = now = self._sample(overslept_s)
        while not self._is_stopped.wait(pause_s):
            overslept_s += time.monotonic() - now.moment - pause_s
            beat, now = self._beat, self._sample(overslept_s)
            if beat != seen:
                seen, before = beat, now
            silent_s = now.moment - beat - BEAT_S
            if silent_s > self._limit_s and beat != reported:
                reported = beat
                self._tell(silent_s, before, now)

    def _tell(self, silent_s: float, before: Sample, now: Sample) -> None:
        missed_s, window_s = missed(before, now), now.moment - before.moment
        if missed_s:
            _log.warning(
                "the machine gave this process no CPU for %.3f of the last %.3f s: it is overloaded, or "
                "the process was paused; the event loop was in: %s",
                *(missed_s, window_s, self._where()),
            )
        else:
            _log.warning("the event loop is held up, for %.3f s so far, in: %s", silent_s, self._where())

    def _sample(self, overslept_s: float) -> Sample:
        return Sample(time.monotonic(), overslept_s, *_scheduled(self._native_id))

    def _where(self) -> str:
        """Return the loop's stack, innermost call first, in one line."""
        frame = sys._current_frames().get(self._loop_thread)
        calls = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
        return " < ".join(f"{call.filename}:{call.lineno} {call.name}" for call in reversed(calls))
