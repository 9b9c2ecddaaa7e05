"""One request of a run, from the orchestrator's side: whoever reads the answer, at whatever pace."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from orchestrator.transport.base import Answer, Origin, Upstream
from tests.simulation.streams.content import request_body
from tests.simulation.streams.schedule import Client, Leaving, RequestSpec
from tests.simulation.trace import Trace

ORIGIN = Origin("worker", 80)
LIMIT = 1 << 30
LAST_WORD_S = 2.0  # from leaving until the answer is given up


@dataclass(slots=True)
class Outcome:
    """What has become of a request."""

    spec: RequestSpec
    began: float | None = None
    ended: float | None = None
    left: float | None = None  # when it was given up, or told that the client has left
    is_heard_out: bool = False  # it was told that, and its answer is still read
    status: int = 0
    headers: dict[bytes, bytes] | None = None
    body: bytes = b""
    is_complete: bool = False
    error: BaseException | None = None  # None also if it was given up


class Asking:
    """It sends its request, and reads or leaves as the schedule says."""

    def __init__(self, spec: RequestSpec, upstream: Upstream, trace: Trace) -> None:
        self.outcome = Outcome(spec)
        self._spec = spec
        self._upstream = upstream
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._answer: Answer | None = None
        self._got = bytearray()
        self._is_paused_once = False

    async def run(self) -> None:
        outcome, loop = self.outcome, self._loop
        await asyncio.sleep(self._spec.at)
        outcome.began = loop.time()
        task = loop.create_task(self._ask())
        timer = self._plan_leaving(task)
        try:
            await task
        except asyncio.CancelledError:
            self._note_left()
        except Exception as error:
            outcome.error = error
        finally:
            if timer is not None:
                timer.cancel()
            self._finish()

    def _plan_leaving(self, task: asyncio.Task[None]) -> asyncio.TimerHandle | None:
        leaving = self._spec.leaving
        if leaving is None and self._spec.waits:
            leaving = Leaving.ABORT
        if leaving is None:
            return None
        return self._loop.call_later(self._spec.leaves_after, self._leave, task, leaving)

    def _leave(self, task: asyncio.Task[None], leaving: Leaving) -> None:
        if task.done():
            return
        self._note_left()
        answer = self._answer
        if leaving is Leaving.CANCEL or answer is None:
            task.cancel()
        elif leaving is Leaving.ABORT:
            answer.abort()
        else:
            self.outcome.is_heard_out = True
            answer.leave()
            self._loop.call_later(LAST_WORD_S, answer.abort)

    def _note_left(self) -> None:
        if self.outcome.left is None:
            self.outcome.left = self._loop.time()
            self._trace.add(f"client {self._spec.number}", "leaves")

    def _finish(self) -> None:
        outcome, answer = self.outcome, self._answer
        outcome.ended, outcome.body = self._loop.time(), bytes(self._got)
        if answer is not None:
            outcome.status, outcome.headers = answer.status, answer.headers
            answer.abort()
        name = f"client {self._spec.number}"
        self._trace.add(name, f"has {len(self._got)} bytes, {outcome.status}, {outcome.error!r}")

    async def _ask(self) -> None:
        spec = self._spec
        whole = memoryview(request_body(spec.number, spec.body))
        step = len(whole) // spec.body_parts + 1
        parts = [whole[start : start + step] for start in range(0, len(whole), step)] or [b""]
        parts.insert(spec.number % len(parts), b"")  # parts may be empty
        target = f"/v1/r{spec.number}?q={spec.number}"
        fields = b"x-number: %d\r\n" % spec.number
        self._trace.add(f"client {spec.number}", "sends")
        self._answer = await self._upstream.send(ORIGIN, spec.method, target, fields, parts)
        await self._read(self._answer)
        self.outcome.is_complete = True

    async def _read(self, answer: Answer) -> None:
        client = self._spec.client
        if client is Client.READ:
            await answer.head()
            await asyncio.sleep(self._spec.pause_s)
            self._got += await answer.read(LIMIT)
        elif client is Client.CHUNKS:
            while chunk := await answer.chunk():
                self._got += chunk
                await self._pause()
        else:
            await answer.pump(self._sink)

    async def _pause(self) -> None:
        if not self._is_paused_once:
            self._is_paused_once = True
            await asyncio.sleep(self._spec.pause_s)

    def _sink(self, data: bytes) -> bool:
        self._got += data
        if self._is_paused_once or not self._spec.pause_s or self._answer is None:
            return True
        self._is_paused_once = True
        self._loop.call_later(self._spec.pause_s, self._answer.resume)
        return False
