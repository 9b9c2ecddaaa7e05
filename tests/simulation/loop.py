"""An event loop whose time is a number: it jumps to the next timer whenever nothing else is left to do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Deadlock(RuntimeError):
    """Everything waits, and no timer is set: nothing could ever happen again."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """asyncio's own loop without its selector: no sockets, no threads, no real time.

    What runs in which order depends on the program alone, and an hour of waiting takes no time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self
        self._clock_resolution = 1e-9  # timers closer than this are due together

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> tuple[()]:
        """Where the base class waits for sockets: the one place where time passes."""
        if timeout is None:
            raise Deadlock("everything waits, and no timer is set")
        self._now += timeout
        return ()

    def _process_events(self, event_list: tuple[()]) -> None:
        """There are none: `select` never returns any."""

    def _write_to_self(self) -> None:
        raise RuntimeError("a thread wants to wake a loop that has none beside it")


def run_virtually(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` in virtual time. Tasks that are left at the end are cancelled, as there."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
