"""A monitor measures several times a second how late the event loop is."""

from __future__ import annotations

import asyncio

from orchestrator.telemetry.counters import Telemetry


class LoopLagMonitor:
    """A monitor measures how late the event loop calls what is due: every request waits for that long too."""

    def __init__(self, telemetry: Telemetry, period_s: float = 0.1) -> None:
        self._telemetry = telemetry
        self._period_s = period_s
        self.last_s = 0.0
        self.max_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._period_s
            await asyncio.sleep(self._period_s)
            self.note(max(0.0, loop.time() - due))

    def note(self, lag_s: float) -> None:
        self.last_s = lag_s
        self.max_s = max(self.max_s, lag_s)
        self._telemetry.loop_lag(lag_s)
