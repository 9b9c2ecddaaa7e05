from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Iterator

import pytest

from orchestrator.compiled import ROOT
from orchestrator.telemetry import events as module
from orchestrator.telemetry.events import (
    KINDS,
    MAX_EVENTS,
    MAX_SUBJECT,
    MAX_TEXT,
    MOST_COUNTED,
    Event,
    Events,
)
from orchestrator.workers.states import _TABLE


def kinds(events: Events) -> list[tuple[str, str]]:
    return [(event.kind, event.message) for event in events.after()]


def test_the_last_ones_are_kept_and_numbered_from_the_start() -> None:
    events = Events(lambda: 7.0)
    for index in range(MAX_EVENTS + 3):
        events.note("worker.gone", f"{index}")
    found = events.after()
    assert (len(found), found[0].number, events.oldest, events.newest) == (1000, 4, 4, 1003)
    assert found[-1] == Event(1003, 7.0, "worker.gone", "1002")
    assert [event.message for event in events.after(1001)] == ["1001", "1002"]


def test_texts_from_outside_are_bounded() -> None:
    events = Events()
    events.note("worker.gone", "x" * 1_000_000, subject="y" * 1_000_000)
    [event] = events.after()
    assert (len(event.message), len(event.subject)) == (MAX_TEXT, MAX_SUBJECT)


def test_events_are_found_by_kind_or_by_what_begins_with_it() -> None:
    events = Events()
    for kind in ("worker.gone", "worker.ready", "admin.drain"):
        events.note(kind, kind)
    assert [event.kind for event in events.after(0, {"worker"})] == ["worker.gone", "worker.ready"]
    assert [event.kind for event in events.after(1, {"worker"})] == ["worker.ready"]
    assert [event.kind for event in events.after(0, {"worker.gone", "admin"})] == [
        "worker.gone",
        "admin.drain",
    ]


def test_what_another_process_has_seen_takes_its_place_among_all() -> None:
    supervisor, passed = Events(), []
    process = Events(lambda: 5.0, passed.append)
    supervisor.note("worker.gone", "one")
    process.note("request.resent", "two", subject="w")
    assert process.after() == []
    supervisor.take(passed[0], 3)
    supervisor.note("worker.ready", "three")
    assert [(event.number, event.message, event.process) for event in supervisor.after()] == [
        (1, "one", None),
        (2, "two", 3),
        (3, "three", None),
    ]
    assert supervisor.after()[1].time == 5.0


def test_whoever_waits_is_woken_by_the_next_one() -> None:
    async def main() -> None:
        events = Events()
        waiting = asyncio.create_task(events.wait_after(1))
        events.note("worker.gone", "one")
        await asyncio.sleep(0)
        assert not waiting.done()
        events.note("worker.gone", "two")
        await waiting
        await events.wait_after(1)

    asyncio.run(main())


def test_what_comes_often_is_told_at_once_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.01)

    async def main() -> None:
        events = Events()
        for index in range(500):
            events.note_often("request.resent", f"no. {index}", subject="w")
        assert kinds(events) == [("request.resent", "no. 0")]
        await asyncio.wait_for(events.wait_after(1), 10)
        assert events.after(1)[0].message == "499 times more in 0.01 s, the last time: no. 499"
        while events._repeated:  # noqa: ASYNC110  # a period in which nothing happens ends it
            await asyncio.sleep(0.01)
        events.note_often("request.resent", "again", subject="w")
        assert events.after(2)[0].message == "again"

    asyncio.run(main())


def test_what_is_counted_is_bounded() -> None:
    async def main() -> None:
        events = Events()
        for index in range(10_000):
            events.note_often("request.resent", "x", subject=f"w{index}")
        assert len(events._repeated) == MOST_COUNTED + 1
        assert len(events.after()) == MOST_COUNTED + 1

    asyncio.run(main())


# --- the table of kinds -------------------------------------------------------------------------

KIND = re.compile(
    r"(worker|request|lease|process|discovery|log|admin|certificate|scaling)\.[a-z_]+"
).fullmatch


def noted() -> Iterator[str]:
    """The kinds that the code notes, as it writes them."""
    for file in (ROOT / "orchestrator").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and file.name != "events.py" and KIND(value):
                yield value


def test_the_kinds_that_the_code_notes_are_those_of_the_table() -> None:
    moves = {f"worker.{state}" for row in _TABLE.values() for state in row.values()}
    changes = {f"admin.{change}" for change in ("add", "remove", "drain", "undrain")}
    assert {*noted(), *moves, *changes} == set(KINDS)


def test_the_docs_have_the_same_table() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+) \|$", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    assert {kind: text for kind, text in rows if "." in kind} == KINDS
