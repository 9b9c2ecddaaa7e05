"""An answer goes this way to the client, faults included: ASGI responses work while they are sent.

A client that leaves ends the generation, in every phase; so does
`POST /v1/baton/end`, and then it is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from worker.sim import faults, frames, text
from worker.sim.engine import Engine
from worker.sim.faults import Plan
from worker.sim.generate import Opened, Outcome, Piece, generate
from worker.sim.handoffs.base import KvLost
from worker.sim.journal import Entry
from worker.sim.links import TRANSPORT_KEY, Link, reset, whole
from worker.sim.protocol import Job
from worker.sim.runs import Run
from worker.token_ids import RequestedIds, encode_answer, pack

_GARBAGE_HEAD = b"\x16\x03\x01\x02\x00 this is not HTTP \xff\xfe\r\n\r\n"
_GARBAGE_BODY = b'data: {"choices": [{"index": 0, "del\xff\xfe\x00\x00\n\n'


@dataclass(frozen=True, slots=True)
class Content:
    """This is the body of a whole answer, and what its head says of it."""

    body: bytes
    type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


class _Ended(Exception):
    """A fault has ended the answer."""


class EngineResponse(Response):
    """An answer is made when it is sent, and struck by faults."""

    kv_error = frames.Answer.kv_error

    def __init__(self, engine: Engine, plan: Plan, entry: Entry) -> None:
        self._engine = engine
        self._plan = plan
        self._entry = entry
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = Wire(scope, receive, send)
        if await run_until_gone(self._deliver(wire), receive):
            return
        if wire.has_ended:
            return
        self._entry.outcome = "aborted"
        self._engine.aborted += 1
        self._engine.metrics.finished["abort"].inc()

    async def _deliver(self, wire: Wire) -> None:
        try:
            await self._strike(self._plan.at_head(), wire)
            await self._send_answer(wire)
            if self._entry.outcome == "running":
                self._entry.outcome = "done"
        except _Ended:
            pass
        except KvLost as error:
            self._entry.outcome = f"kv lost: {error}"
            self._engine.metrics.finished["error"].inc()
            await wire.send_whole(500, Content(self.kv_error))

    async def _send_answer(self, wire: Wire) -> None:
        raise NotImplementedError

    async def _send_content(self, content: Content, wire: Wire) -> None:
        if struck := self._plan.in_body():
            self._note(struck[0])
            await self._strike_whole(content, wire)
        else:
            await wire.send_whole(200, content)

    async def _strike_whole(self, content: Content, wire: Wire) -> None:
        """Commit the fault that strikes in the middle of the body."""
        body = content.body
        half = body[: len(body) // 2]
        match self._plan.in_body()[0]:
            case faults.Truncate(clean=True):
                await wire.send_whole(200, replace(content, body=half))
            case faults.Garbage():
                await wire.send_whole(200, replace(content, body=half + _GARBAGE_BODY))
            case faults.Error() as error:
                await wire.strike(error)
            case fault:
                await wire.send_head(200, content.type, len(body), *content.headers)
                await wire.send_body(half)
                await wire.strike(fault)
                await wire.send_body(body[len(half) :], is_last=True)

    async def _strike(self, struck: list[faults.Placed], wire: Wire) -> None:
        """Commit a fault. Raises `_Ended` unless the answer goes on."""
        for fault in struck:
            self._note(fault)
            await wire.strike(fault)

    def _note(self, fault: faults.Placed) -> None:
        self._entry.outcome = f"fault: {type(fault).__name__.lower()}"


class GenerationResponse(EngineResponse):
    """`wanted` says in which form an answer gives the prompt's ids, if it gives them and is no stream; `form`
    is the endpoint's form of answers.
    """

    def __init__(
        self,
        engine: Engine,
        job: Job,
        plan: Plan,
        entry: Entry,
        wanted: RequestedIds | None = None,
        form: Callable[[Job], frames.Answer] = frames.answer_for,
    ) -> None:
        super().__init__(engine, plan, entry)
        packs = wanted is not None and job.return_token_ids and not job.is_stream
        self._wanted = wanted if packs else None
        self._job = replace(job, return_token_ids=False) if packs else job
        self._answer = form(self._job)
        self.kv_error = self._answer.kv_error
        self._work: asyncio.Task[Any] | None = None  # while it can be ended
        self._is_ended = False
        self._is_open = False  # of a stream: its first events are sent
        engine.metrics.tokenized_prompts.inc(job.tokenized)

    async def _send_answer(self, wire: Wire) -> None:
        under_way, name = self._engine.under_way, self._entry.name
        self._work = asyncio.current_task()
        wire.error_events = self._answer.error_events
        under_way[name] = self._end
        try:
            await (self._stream(wire) if self._job.is_stream else self._whole(wire))
        except asyncio.CancelledError:
            if not self._is_ended:
                raise
            await self._send_ended(wire)
        finally:
            under_way.pop(name, None)
            self._engine.begun.discard(name)

    def _end(self) -> None:
        """Stop here; what is complete is answered as it is."""
        work, self._work = self._work, None
        if work is not None:
            self._is_ended = True
            work.cancel()

    async def _send_ended(self, wire: Wire) -> None:
        """Send what vLLM says of a request that was ended: less than nothing was made of it."""
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
        self._entry.outcome = "ended"
        self._engine.metrics.finished["abort"].inc()
        run = Run(self._job.prompts[0], b"", cached_tokens=0, created_tokens=0, was_received=False)
        last = [Piece(index, text.EOS, "", "abort") for index in range(self._job.choices)]
        if not self._job.is_stream:
            outcome = Outcome([run], {piece.index: [piece] for piece in last})
            return await self._send_content(self._content(outcome), wire)
        opening = [] if self._is_open else self._answer.opening(Opened(0, run))
        events = [*opening, *map(self._answer.said, last), *self._answer.aborted()]
        await wire.send_body(b"".join(events), is_last=True)
        return None

    # --- whole answers

    async def _whole(self, wire: Wire) -> None:
        outcome = await self._outcome()
        self._work = None  # nothing waits between its last token and this
        await self._send_content(self._content(outcome), wire)

    def _content(self, outcome: Outcome) -> Content:
        document = self._answer.whole(outcome)
        if self._wanted is None:
            return Content(orjson.dumps(document))
        packed = pack(outcome.runs[0].prompt.tokens)
        body, content_type = encode_answer(document, self._wanted.form, packed)
        return Content(body, content_type.encode())

    async def _outcome(self) -> Outcome:
        outcome = Outcome()
        async with aclosing(self._events()) as events:
            async for item in events:
                if isinstance(item, Opened):
                    outcome.runs.append(item.run)
                else:
                    outcome.pieces.setdefault(item.index, []).append(item)
        return outcome

    # --- streams

    async def _stream(self, wire: Wire) -> None:
        await wire.send_head(200, b"text/event-stream; charset=utf-8")
        try:
            await self._strike(self._plan.after_tokens(0), wire)
            async with aclosing(self._events()) as events:
                await self._send_events(events, wire)
            await self._strike(self._plan.after_tokens(-1), wire)
            await wire.send_last(self._answer.ending())
        except KvLost as error:
            await self._send_kv_error(error, wire)

    async def _send_events(self, events: AsyncGenerator[Opened | Piece], wire: Wire) -> None:
        sent = 0
        async for item in events:
            if isinstance(item, Opened):
                self._is_open = True
                for part in self._answer.opening(item):
                    await wire.send_body(part)
            else:
                await wire.send_body(self._answer.said(item))
                sent += 1
                await self._strike(self._plan.after_tokens(sent), wire)

    async def _send_kv_error(self, error: KvLost, wire: Wire) -> None:
        """Send the error as vLLM does."""
        self._entry.outcome = f"kv lost: {error}"
        self._engine.metrics.finished["error"].inc()
        if not self._answer.cuts_stream:
            return await wire.send_last(self._answer.lost())
        await wire.send_body(b"".join(self._answer.lost()))
        await wire.cut()
        raise _Ended

    # --- both

    async def _events(self) -> AsyncGenerator[Opened | Piece]:
        metrics, loop = self._engine.metrics, asyncio.get_running_loop()
        started, is_first = loop.time(), True
        async with aclosing(generate(self._engine, self._job, self._plan)) as events:
            async for item in events:
                if isinstance(item, Piece):
                    metrics.generation_tokens.inc()
                    if is_first:
                        self._engine.begun.add(self._entry.name)
                        metrics.first_token_seconds.observe(loop.time() - started)
                        is_first = False
                    if item.finish:
                        metrics.finished[item.finish].inc()
                yield item
        metrics.request_seconds.observe(loop.time() - started)


class ProbeResponse(Response):
    """It is what a probe is answered with, 200 without a body as a rule, or what a fault makes of it."""

    def __init__(self, plan: Plan, content: bytes | None = None, status: int = 200) -> None:
        super().__init__(content, status, media_type=None if content is None else "application/json")
        self._plan = plan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_until_gone(self._deliver(scope, receive, send), receive)

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = Wire(scope, receive, send)
        try:
            for fault in self._plan.at_head():
                await wire.strike(fault)
            await super().__call__(scope, receive, send)
        except _Ended:
            pass


class Wire:
    """It is one request's way back, down to the connection."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._link: Link | None = scope.get("state", {}).get(TRANSPORT_KEY)
        self._receive = receive
        self._send = send
        self._has_head = False
        self._is_stream = False
        self.has_ended = False  # by a fault
        self.error_events: Callable[[bytes], bytes | None] = frames.error_events

    async def send_head(
        self, status: int, content_type: bytes, length: int | None = None, *more: tuple[bytes, bytes]
    ) -> None:
        headers = [(b"content-type", content_type), *more]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self._has_head, self._is_stream = True, length is None
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_body(self, content: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": not is_last})

    async def send_last(self, parts: Sequence[bytes]) -> None:
        """Send these, one by one, and the end."""
        for part in parts[:-1]:
            await self.send_body(part)
        await self.send_body(parts[-1], is_last=True)

    async def cut(self) -> None:
        """End the connection, not the answer."""
        self.has_ended = True
        await self._close()

    async def send_whole(self, status: int, content: Content) -> None:
        await self.send_head(status, content.type, len(content.body), *content.headers)
        await self.send_body(content.body, is_last=True)

    async def strike(self, fault: faults.Placed) -> None:
        """Commit a fault. Raises `_Ended` unless the answer goes on after it."""
        if isinstance(fault, faults.Stall):
            return await _sleep(fault.seconds)
        self.has_ended = True
        match fault:
            case faults.Error():
                await self._send_error(fault)
            case faults.Reset():
                link = self._connection()
                reset(whole(link) if fault.connection else link)
            case faults.Truncate():
                await self._truncate(fault)
            case faults.Garbage():
                await self._send_garbage()
        raise _Ended

    async def _send_error(self, fault: faults.Error) -> None:
        content = frames.error_body(fault.message, "InternalServerError", fault.status)
        if self._is_stream and (events := self.error_events(content)) is not None:
            await self.send_body(events, is_last=True)
        elif self._is_stream:
            await self._close()
        elif not self._has_head:
            later = () if fault.retry_after is None else ((b"retry-after", b"%d" % fault.retry_after),)
            await self.send_whole(fault.status, Content(content, headers=later))

    async def _truncate(self, fault: faults.Truncate) -> None:
        if self._has_head and fault.clean:
            await self.send_body(b"", is_last=True)
        else:
            await self._close()

    async def _send_garbage(self) -> None:
        if self._has_head:
            await self.send_body(_GARBAGE_BODY, is_last=True)
        else:
            self._connection().write(_GARBAGE_HEAD)
            await self._close()

    async def _close(self) -> None:
        """Send FIN after what was written. The server is told by the disconnect that there is no more."""
        self._connection().close()
        await _wait_gone(self._receive)

    def _connection(self) -> Link:
        if self._link is None:
            raise RuntimeError("this fault needs a real connection: run the app with worker.sim.server")
        return self._link


async def run_until_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Run `work`, cancelled when the client leaves. Return whether it came to its end; its exceptions are
    raised.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_done = working.done()
        for task in (working, gone):
            task.cancel()
        await asyncio.wait((working, gone))
    if is_done:
        working.result()
    return is_done


async def _wait_gone(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


async def _sleep(seconds: float | None) -> None:
    if seconds is None:
        await asyncio.get_running_loop().create_future()
    else:
        await asyncio.sleep(seconds)
