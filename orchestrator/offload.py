"""Work that would hold the event loop up, done in a process of its own.

msgspec and orjson keep the interpreter's lock while they work: a thread would hold the loop up all the same.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

from orchestrator.errors import BatonError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger("baton.offload")


class Offload:
    """A pool of processes for one event loop. They start with the first call and end with `aclose`.

    A call costs some 0.3 ms, and 2 ms per MiB in or out, of which the loop sees little. So what takes less
    than 200 us is done in place: callers know how many bytes of theirs that is.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._starting = asyncio.Lock()

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """`function(*args)`, elsewhere. It must be a module's function without side effects.

        Raises what the function raises. If a process is killed, the calls that were under way are made once
        more, in a fresh one; `BatonError` if that one does not live either. Cancelling drops the result.
        """
        try:
            return await self._try(function, *args, **kwargs)
        except BrokenProcessPool:
            _log.warning("the process for large bodies was killed; starting another")
        try:
            return await self._try(function, *args, **kwargs)
        except BrokenProcessPool as error:
            raise BatonError("the process for large bodies was killed twice") from error

    async def aclose(self) -> None:
        """End the processes; calls under way are finished, those that wait are cancelled. Repeatable."""
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)

    async def _try(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        executor = await self._started()
        try:
            return await asyncio.wrap_future(executor.submit(function, *args, **kwargs))
        except BrokenProcessPool:
            if self._executor is executor:  # the first to notice
                self._executor = None
            raise

    async def _started(self) -> ProcessPoolExecutor:
        async with self._starting:
            if self._executor is None:
                self._executor = await asyncio.to_thread(_start, self._processes)
            return self._executor


def _start(processes: int) -> ProcessPoolExecutor:
    """Takes some 10 ms. Spawned, because a fork would copy the event loop and every connection."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    for _ in range(processes):
        executor.submit(os.getpid)  # a process is only started when a call finds none idle
    return executor


def _begin() -> None:
    """In a new process: Ctrl-C is for the parent, which ends this one; but its sudden death is for both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
