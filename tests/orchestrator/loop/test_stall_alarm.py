from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from orchestrator.loop import stall_alarm
from orchestrator.loop.stall_alarm import Sample, StallAlarm, missed


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


# --- who is to blame ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overslept_s", "ran_s", "waited_s", "expected"),
    [
        (0.0, 1.0, 0.0, 0.0),  # it computes
        (0.9, 0.9, 0.1, 0.0),  # it computes, and holds the interpreter's lock: who watches is late as well
        (0.0, 0.0, 0.0, 0.0),  # it sleeps, or waits for a disk
        (0.0, 0.1, 0.9, 0.9),  # others have the CPU
        (0.9, 0.0, 0.0, 0.9),  # the process was paused, or throttled
    ],
)
def test_what_the_system_says_of_a_stall(
    overslept_s: float, ran_s: float, waited_s: float, expected: float
) -> None:
    before = Sample(10.0, 0.0, 5.0, 2.0)
    now = Sample(11.0, overslept_s, 5.0 + ran_s, 2.0 + waited_s)
    assert missed(before, now) == pytest.approx(expected)


def test_a_machine_that_gives_no_cpu_is_named_and_no_code(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()
    monkeypatch.setattr(stall_alarm, "_scheduled", lambda _: (0.0, time.monotonic() - begun))
    watched(said, lambda: hold_up(said.event))
    assert said.lines[0].startswith("the machine gave this process no CPU for 0.")
    assert "held up" not in said.lines[0]


def test_threads_of_this_process_have_figures() -> None:
    before, _ = stall_alarm._scheduled(threading.get_native_id())
    sum(range(3_000_000))
    after, _ = stall_alarm._scheduled(threading.get_native_id())
    assert after > before
