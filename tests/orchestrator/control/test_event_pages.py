"""/admin/events as a list and as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from orchestrator.control import event_pages
from orchestrator.control.admin import admin_app
from orchestrator.telemetry.events import MAX_EVENTS
from tests.orchestrator.control.fakes import FakeState, ask, error_code


def noted(*kinds: str) -> FakeState:
    state = FakeState()
    for kind in kinds:
        state.events.note(kind, kind)
    return state


def test_events_are_picked_by_number_and_kind() -> None:
    app = admin_app(noted("worker.gone", "admin.drain", "worker.ready"))
    found = {
        query: [event["number"] for event in ask(app, f"/admin/events{query}").json()]
        for query in ("", "?after=1", "?kind=worker", "?kind=worker.ready&kind=admin", "?after=1&kind=worker")
    }
    assert [*found.values()] == [[1, 2, 3], [2, 3], [1, 3], [2, 3], [3]]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("after=x", "'after' is a whole number from 0 to 1000000000000000"),
        ("after=-1", "'after' is a whole number"),
        ("after=٣", "'after' is a whole number"),
        ("after=99999999999999999999999", "'after' is a whole number"),
        ("after=1&after=2", "'after' is given more than once"),
        ("aftr=1", "unknown parameter 'aftr'; there is: after, follow, kind"),
        (
            "kind=worker.lost",
            "no events are of the kind 'worker.lost'; there is: admin, certificate, discovery, lease, ",
        ),
        ("kind=%0d%0aX:%1b[31m", "no events are of the kind '\\r\\nX:\\x1b[31m'"),
        ("follow=yes", "'follow' is 1 or 0"),
    ],
)
def test_a_query_that_makes_no_sense_is_named(query: str, says: str) -> None:
    answer = ask(admin_app(noted()), f"/admin/events?{query}")
    assert (answer.status_code, error_code(answer)) == (400, "invalid_request")
    assert answer.json()["error"]["message"].startswith(says)


# --- the stream ---------------------------------------------------------------------------------


class Listener:
    """An ASGI server that follows the events; it reads one message of the answer after the other."""

    def __init__(
        self,
        state: FakeState,
        query: str = "",
        method: str = "GET",
        app: FastAPI | None = None,
        **headers: str,
    ) -> None:
        self.read: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._left = asyncio.Event()
        scope = {
            "type": "http",
            "method": method,
            "path": "/admin/events",
            "query_string": f"follow=1{query}".encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
        }
        self.task = asyncio.create_task((app or admin_app(state))(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.may_write.wait()
        await self.read.put(message)

    async def next(self) -> str:
        """The text of the next message with a body."""
        message = await asyncio.wait_for(self.read.get(), 20)
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
            assert (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
            return await self.next()
        text: str = message.get("body", b"").decode()
        return text

    async def events(self, count: int) -> list[dict[str, Any]]:
        """So many events; comments and ids are left out."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            lines = (await self.next()).splitlines()
            found += [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        return found

    async def leave(self) -> None:
        self._left.set()
        await asyncio.wait_for(self.task, 20)


def following(test: Callable[[FakeState], Awaitable[None]], *kinds: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await test(noted(*kinds))

    asyncio.run(main())


def test_a_stream_begins_with_what_was_and_goes_on_with_what_comes() -> None:
    async def test(state: FakeState) -> None:
        listener = Listener(state, "&after=1")
        assert [event["kind"] for event in await listener.events(1)] == ["admin.drain"]
        state.events.note("worker.ready", "\x1b[31m\r\ndata: forged\n\n")
        text = await listener.next()
        assert text.startswith(f"id: {state.events.run}.3\ndata: {{")
        assert text.count("\n") == 3  # whatever is in a message, it is one line of JSON
        await listener.leave()

    following(test, "worker.gone", "admin.drain")


def test_a_stream_has_only_the_kinds_that_were_asked_for() -> None:
    async def test(state: FakeState) -> None:
        listener = Listener(state, "&kind=worker")
        for kind in ("admin.drain", "worker.gone", "log.lost", "worker.ready"):
            state.events.note(kind, kind)
        assert [event["kind"] for event in await listener.events(2)] == ["worker.gone", "worker.ready"]
        await listener.leave()

    following(test)


def test_a_stream_is_taken_up_where_it_was_cut() -> None:
    async def test(state: FakeState) -> None:
        listener = Listener(state, last_event_id=f"{state.events.run}.2")
        assert [event["number"] for event in await listener.events(1)] == [3]
        await listener.leave()
        other_run = Listener(state, last_event_id="0badcafe.2")  # numbers have begun anew since
        assert [event["number"] for event in await other_run.events(3)] == [1, 2, 3]
        await other_run.leave()

    following(test, "worker.gone", "worker.suspect", "worker.ready")


def test_an_id_that_is_none_is_refused() -> None:
    answer = ask(admin_app(noted()), "/admin/events?follow=1", headers={"last-event-id": "7; drop"})
    assert (answer.status_code, error_code(answer)) == (400, "invalid_request")


def test_who_falls_behind_is_told_how_many_events_it_has_missed() -> None:
    async def test(state: FakeState) -> None:
        listener = Listener(state)
        await listener.events(1)
        listener.may_write.clear()  # it reads no more: nothing is kept for it
        for index in range(MAX_EVENTS + 150):
            state.events.note("worker.gone", f"{index}")
            if index == 120:
                await asyncio.sleep(0.05)  # until a batch is to be written
        listener.may_write.set()
        found: list[dict[str, Any]] = []
        while not found or "missed" not in found[-1]:
            found += await listener.events(1)
        first_after = (await listener.events(1))[0]["number"]
        told = [event["number"] for event in found[:-1]]
        assert [*told, *range(told[-1] + 1, told[-1] + 1 + found[-1]["missed"])] == [*range(2, first_after)]
        await listener.leave()

    following(test, "worker.gone")


def test_who_reads_nothing_for_too_long_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_pages, "SLOW_S", 0.02)

    async def test(state: FakeState) -> None:
        listener = Listener(state)
        await listener.events(1)
        listener.may_write.clear()
        state.events.note("worker.gone", "")
        await asyncio.wait_for(listener.task, 20)

    following(test, "worker.gone")


def test_a_comment_comes_when_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_pages, "HEARTBEAT_S", 0.01)

    async def test(state: FakeState) -> None:
        listener = Listener(state)
        assert await listener.next() == ": events follow\n\n"
        assert await listener.next() == ": nothing of late\n\n"
        await listener.leave()

    following(test)


def test_listeners_are_bounded_and_leave_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_pages, "MAX_LISTENERS", 1)

    async def test(state: FakeState) -> None:
        app = admin_app(state)
        first = Listener(state, app=app)
        await first.events(1)
        second = Listener(state, app=app)
        refused = await asyncio.wait_for(second.read.get(), 20)
        assert refused["status"] == 503
        await first.leave()
        third = Listener(state, app=app)
        await third.events(1)
        await third.leave()

    following(test, "worker.gone")


def test_the_head_of_a_stream_ends() -> None:
    async def test(state: FakeState) -> None:
        listener = Listener(state, method="HEAD")
        assert await listener.next() == ""
        await asyncio.wait_for(listener.task, 20)

    following(test)
