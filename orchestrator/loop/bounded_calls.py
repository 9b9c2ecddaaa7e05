"""Calls that may hang, as in a file system that is away, are made in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class BoundedCalls:
    """It makes one call at a time, each in a thread of its own.

    A thread that hangs is left behind: the end of the process does not wait for it, and there are never two
    of them, for the next call begins only when the last one has come back.
    """

    def __init__(self, name: str, limit_s: float) -> None:
        """`name` is that of the threads. `limit_s` bounds each call, with the wait for the one before."""
        self._name = name
        self._limit_s = limit_s
        self._is_free: Future[None] | None = None

    async def make(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what the function returns, or raise what it raises; `TimeoutError` if it takes too long."""
        async with asyncio.timeout(self._limit_s):
            while self._is_free is not None and not self._is_free.done():
                await asyncio.wrap_future(self._is_free)
            return await asyncio.wrap_future(self._begun(lambda: function(*args, **kwargs)))

    def _begun(self, call: Callable[[], _T]) -> Future[_T]:
        result: Future[_T] = Future()
        is_free: Future[None] = Future()
        for future in (result, is_free):
            future.set_running_or_notify_cancel()  # a waiter that gives up cancels neither
        self._is_free = is_free
        # Not a thread of the loop's executor: the interpreter ends when all of those have come back.
        Thread(target=_work, args=(call, result, is_free), name=self._name, daemon=True).start()
        return result


def _work(call: Callable[[], _T], result: Future[_T], is_free: Future[None]) -> None:
    try:
        found = call()
    except BaseException as error:
        is_free.set_result(None)
        result.set_exception(error)
    else:
        is_free.set_result(None)
        result.set_result(found)
