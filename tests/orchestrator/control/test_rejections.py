"""Who is refused is told once in a while, in the log and as an event."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from orchestrator.control.rejections import RejectionWatch
from orchestrator.telemetry.counters import Layout, RejectReason, Telemetry
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.tenants import REJECTED, KeyTable
from tests.orchestrator.cluster import Clock

WARNING = logging.WARNING


class Scene:
    """What processes count, and who looks at it each second."""

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.telemetry = Telemetry(Layout(["m"], []))
        self.table = KeyTable.alone()
        self.table.add(names)
        self.events = Events()
        counted = self.table.counted if names else list
        self.watch = RejectionWatch(
            self.telemetry.layout, lambda: self.telemetry.row, counted, self.events, self.clock
        )

    def refuse(self, reason: RejectReason, count: int, name: str = "") -> None:
        for _ in range(count):
            self.telemetry.rejected(reason)
            cells = self.table.cells_of(name)
            if cells is not None:
                cells.add(REJECTED + reason, 1)

    def look(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            self.watch.look()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    with caplog.at_level(WARNING, "baton.rejections"):
        yield caplog.messages


def test_it_is_told_who_was_refused_and_why(lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("alice", "bob")
    scene.look(100)
    scene.refuse(RejectReason.QUEUE_FULL, 8, "bob")
    scene.refuse(RejectReason.TOO_LATE, 2, "bob")
    scene.refuse(RejectReason.KEY_REQUESTS, 3, "alice")
    scene.refuse(RejectReason.MEMORY, 1)
    scene.look()
    text = (
        "14 requests were refused in the last 1 s: 10 of key bob (8 queue_full, 2 too_late), "
        "3 of key alice (3 key_requests), 1 of nobody known (1 memory)"
    )
    assert caplog.messages == [text]
    (event,) = scene.events.after()
    assert (event.kind, event.message, event.who) == ("request.rejected", text, "key bob, key alice")


def test_it_is_told_once_in_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("alice")
    for _ in range(30):
        scene.refuse(RejectReason.QUEUE_FULL, 2, "alice")
        scene.look()
    told = [message.partition(":")[0] for message in caplog.messages]
    assert told == [
        "2 requests were refused in the last 1 s",
        "20 requests were refused in the last 10 s",
        "20 requests were refused in the last 10 s",
    ]
    scene.look(30)
    assert caplog.messages[3].startswith("18 requests were refused in the last 10 s")
    assert len(caplog.messages) == 4


def test_without_keys_reasons_are_told(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.refuse(RejectReason.QUEUE_FULL, 5)
    scene.refuse(RejectReason.WAITED, 7)
    scene.look()
    assert caplog.messages == ["12 requests were refused in the last 1 s: 7 waited, 5 queue_full"]


def test_of_many_keys_those_are_named_that_were_refused_most(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"k{number}" for number in range(20)]
    scene = Scene(*names)
    for number, name in enumerate(names):
        scene.refuse(RejectReason.KEY_TOKENS, number + 1, name)
    scene.look()
    (message,) = caplog.messages
    assert "20 of key k19" in message
    assert message.endswith("16 of key k15 (16 key_tokens), and 15 keys more")
