"""The stall alarm says which callback held the event loop up for too long.

The loop cannot tell by itself while it is held up, so a thread watches a heartbeat. It wakes a few times a
second and looks at two numbers; only during a stall does it look at the loop's stack.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback

BEAT_S = 0.05
_FRAMES = 8  # of the stack, the innermost

_log = logging.getLogger("baton.loop")


class StallAlarm:
    """The alarm warns once for every stall longer than `limit_s`, with the stack as it was then.

    Start it in the thread of a running event loop; `stop` ends the thread.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop_thread = threading.get_ident()
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
        reported = 0.0
        while not self._is_stopped.wait(self._limit_s / 4):
            beat = self._beat
            silent_s = time.monotonic() - beat - BEAT_S
            if silent_s > self._limit_s and beat != reported:
                reported = beat
                _log.warning("the event loop is held up, for %.3f s so far, in: %s", silent_s, self._where())

    def _where(self) -> str:
        """Return the loop's stack, innermost call first, in one line."""
        frame = sys._current_frames().get(self._loop_thread)
        calls = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
        return " < ".join(f"{call.filename}:{call.lineno} {call.name}" for call in reversed(calls))
