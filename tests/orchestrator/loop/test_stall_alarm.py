from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from orchestrator.loop.stall_alarm import StallAlarm


def hold_up(until: threading.Event) -> None:
    """A callback that does not return before somebody else says so."""
    assert until.wait(60)


class Said(logging.Handler):
    """Sets an event with the first warning."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.event.set()


@pytest.fixture
def said() -> Said:
    return Said()


def watched(said: Said, callback: object) -> None:
    """Run a callback in a watched event loop."""

    async def main() -> None:
        alarm = StallAlarm(0.02)
        alarm.start()
        try:
            callback()  # type: ignore[operator]
            await asyncio.sleep(0)
        finally:
            alarm.stop()

    logger = logging.getLogger("baton.loop")
    logger.addHandler(said)
    try:
        asyncio.run(main())
    finally:
        logger.removeHandler(said)


def test_the_callback_that_holds_the_loop_up_is_named(said: Said) -> None:
    watched(said, lambda: hold_up(said.event))  # it returns once the warning was given
    assert "hold_up" in said.lines[0]
    assert "\n" not in said.lines[0]


def test_a_stall_is_reported_once(said: Said) -> None:
    def stall() -> None:
        hold_up(said.event)
        time.sleep(0.1)  # several more looks of the thread

    watched(said, stall)
    assert len(said.lines) == 1


def test_the_thread_ends_with_the_alarm() -> None:
    async def main() -> StallAlarm:
        alarm = StallAlarm(0.02)
        alarm.start()
        alarm.stop()
        alarm.stop()
        return alarm

    thread = asyncio.run(main())._thread
    thread.join(60)
    assert not thread.is_alive()
