"""Waiters wait for something to happen to a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """Several may wait; each looks for itself what has happened.

    This is made only when somebody has to wait.
    """

    _futures: tuple[asyncio.Future[None], ...] = ()

    async def wait(self) -> None:
        """Wait until the next `wake()`."""
        waiter = asyncio.get_running_loop().create_future()
        self._futures += (waiter,)
        await waiter

    def wake(self) -> None:
        futures, self._futures = self._futures, ()
        for waiter in futures:
            if not waiter.done():
                waiter.set_result(None)


class Callback(Waiters):
    """Somebody is called instead, each time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def wake(self) -> None:
        self._call()
