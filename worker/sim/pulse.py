"""The pulse of an engine stops while it stands still: its server answers, but nothing gets on."""

from __future__ import annotations

import asyncio


class Pulse:
    """Whatever the engine does waits for this first."""

    def __init__(self) -> None:
        self._goes = asyncio.Event()
        self._goes.set()
        self._stops = 0

    @property
    def stands_still(self) -> bool:
        return not self._goes.is_set()

    def stop(self, seconds: float | None) -> None:
        """Stand still for `seconds`, None for ever; the last call counts."""
        self._stops += 1
        self._goes.clear()
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self._go_on, self._stops)

    def go_on(self) -> None:
        self._goes.set()

    async def wait(self) -> None:
        """Return when the engine gets on."""
        await self._goes.wait()

    def _go_on(self, stops: int) -> None:
        if stops == self._stops:
            self.go_on()
