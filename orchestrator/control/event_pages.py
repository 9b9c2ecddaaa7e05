"""/admin/events shows what has happened of late, as a list or as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.control.queries import MOST_DIGITS, Query
from orchestrator.errors import ClientError, Overloaded
from orchestrator.telemetry.events import KINDS, Event, Events

MAX_LISTENERS: Final = 32
HEARTBEAT_S: Final = 15.0  # proxies cut connections that are silent for a minute
SLOW_S: Final = 30.0  # a listener that has read nothing for so long is left alone
BATCH: Final = 100  # events that are written at a time

_GROUPS: Final = frozenset(kind.partition(".")[0] for kind in KINDS)
_last_id: Final = re.compile(rf"(\w{{1,32}})\.(\d{{1,{MOST_DIGITS}}})", re.ASCII).fullmatch


class EventPages:
    def __init__(self, events: Events) -> None:
        self._events = events
        self._listeners = 0

    async def events(self, request: Request) -> Response:
        """Answer with the events after `?after=`, of each `?kind=`; with `?follow=1` as a stream.

        A stream is taken up again by the id of the last event, as `?after=` or in the header `Last-Event-ID`.
        """
        query = Query(request.query_params, ("after", "follow"), ("kind",))
        last = request.headers.get("last-event-id")
        after, kinds = self._after(query, last), _kinds(query.texts("kind"))
        if not query.switch("follow"):
            found = self._events.after(after, kinds)
            return Response(msgspec.json.encode(found), media_type="application/json")
        if self._listeners >= MAX_LISTENERS:
            raise Overloaded(f"{MAX_LISTENERS} listeners follow the events already")
        return EventStream(self, self._events, after, kinds)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Count a listener while this is entered."""
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1

    def _after(self, query: Query, last: str | None) -> int:
        """Return the number after which events are wanted; all are, if what was seen last is of an earlier
        run.
        """
        given = query.text("after") if last is None else last
        found = None if given is None else _last_id(given)
        if found is not None:
            return int(found[2]) if found[1] == self._events.run else 0
        if last is not None:
            raise ClientError("Last-Event-ID is no id of an event of this listener")
        return query.number("after", 0)


class EventStream(Response):
    """This answer is a stream of server-sent events. It keeps no events: a listener that falls behind what is
    kept is told how many it has missed.
    """

    media_type = "text/event-stream"

    def __init__(self, pages: EventPages, events: Events, after: int, kinds: Collection[str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pages = pages
        self._events = events
        self._after = min(after, events.newest)
        self._kinds = kinds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the listener leaves, or does not read any more."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
            return
        with self._pages.listening():
            tasks = [asyncio.create_task(wait) for wait in (_left(receive), self._send_all(send))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        text = b": events follow\n\n"
        while True:
            async with asyncio.timeout(SLOW_S):
                await send({"type": "http.response.body", "body": text, "more_body": True})
            text = await self._next()

    async def _next(self) -> bytes:
        """Return the next events, as soon as there are some; a comment if that takes long."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                while not (text := await self._news()):
                    pass
                return text
        except TimeoutError:
            return b": nothing of late\n\n"

    async def _news(self) -> bytes:
        """Return the next events, as soon as there are some; nothing if none of them is wanted."""
        await self._events.wait_after(self._after)
        missed = self._events.oldest - self._after - 1
        if missed > 0:
            self._after += missed
            return b'id: %b\nevent: gap\ndata: {"missed":%d}\n\n' % (self._id(self._after), missed)
        found = self._events.after(self._after)[:BATCH]
        self._after = found[-1].number
        return self._written(found)

    def _written(self, found: Sequence[Event]) -> bytes:
        wanted = [event for event in found if not self._kinds or event.is_of(self._kinds)]
        return b"".join(
            b"id: %b\ndata: %b\n\n" % (self._id(event.number), msgspec.json.encode(event)) for event in wanted
        )

    def _id(self, number: int) -> bytes:
        return f"{self._events.run}.{number}".encode()


async def _left(receive: Receive) -> None:
    """Wait until whoever asks has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _kinds(given: Sequence[str]) -> frozenset[str]:
    """Return the kinds of events that are asked for; none are all. Raises `ClientError`."""
    for kind in given:
        if kind not in KINDS and kind not in _GROUPS:
            known = ", ".join([*sorted(_GROUPS), *KINDS])
            raise ClientError(f"no events are of the kind {kind[:100]!r}; there is: {known}", param="kind")
    return frozenset(given)
