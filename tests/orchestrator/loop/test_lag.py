from __future__ import annotations

import asyncio
import time

from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.telemetry.counters import LAG_BOUNDS, Layout, Telemetry, histogram_cells

LAYOUT = Layout(["small", "large"], [])


def test_the_lag_monitor_notices_a_blocked_loop() -> None:
    telemetry = Telemetry(LAYOUT)
    monitor = LoopLagMonitor(telemetry, period_s=0.01)

    async def block() -> None:
        task = asyncio.create_task(monitor.run())
        await asyncio.sleep(0)  # the monitor has started its first period
        time.sleep(0.1)  # noqa: ASYNC251 - blocking is what is tested
        async with asyncio.timeout(30):
            while not monitor.last_s:  # noqa: ASYNC110  # nobody sets an event for it
                await asyncio.sleep(0)
        task.cancel()

    asyncio.run(block())
    assert monitor.max_s >= 0.05
    buckets = telemetry.row[LAYOUT.lag : LAYOUT.lag + histogram_cells(LAG_BOUNDS) - 1]
    assert sum(buckets) >= 1


def test_the_lag_monitor_keeps_the_last_and_the_highest() -> None:
    monitor = LoopLagMonitor(Telemetry(LAYOUT))
    for lag in (0.1, 0.3, 0.2):
        monitor.note(lag)
    assert (monitor.last_s, monitor.max_s) == (0.2, 0.3)
