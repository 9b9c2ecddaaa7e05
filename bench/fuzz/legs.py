"""An orchestrator's transport alone sends legs to hostile workers and to an honest one: for `bench.fuzz`.

    python -m bench.fuzz.legs PORT HONEST HOSTILE...

It is told what to do by lines on connections to PORT, each answered by a line of JSON: `wait` until legs to
the honest worker are answered, `go` on to the hostile ones, `stop`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

import uvloop

from bench.shared.bodies import MODEL
from orchestrator.errors import BatonError
from orchestrator.transport.base import Answer, Origin, Upstream
from orchestrator.transport.mux import MuxUpstream
from orchestrator.transport.pool import PooledUpstream

CLIENTS = 64
PATIENCE_S = 0.5  # with an answer of the hostile worker
LIMIT_S = 10.0  # for the honest one, on a machine that has other work
PAUSE_S = 0.02
CLOSES_WITHIN_S = 5.0  # a connection that says nothing
HEADERS = b"content-type: application/json\r\n"
BODY = json.dumps({"model": MODEL, "prompt": "Are you well?", "max_tokens": 3}).encode()
WARM = 20  # answers
LARGE = bytes(300_000)


class Honest:
    """Right requests to an honest worker, one after the other."""

    def __init__(self, upstream: Upstream, origin: Origin) -> None:
        self.answered = 0
        self.is_warm = asyncio.Event()  # some are answered
        self._wrong: list[str] = []
        self._upstream = upstream
        self._origin = origin
        self._connects = 0
        self._is_over = False
        upstream.offer(origin, True)

    async def run(self) -> None:
        while not self._is_over:
            try:
                async with asyncio.timeout(LIMIT_S):
                    await self._ask()
            except (BatonError, TimeoutError) as error:
                self._wrong.append(repr(error))
            await asyncio.sleep(PAUSE_S)

    async def stop(self, task: asyncio.Task[None]) -> None:
        self._is_over = True
        await task

    async def _ask(self) -> None:
        answer = await self._upstream.send(self._origin, "POST", "/v1/completions", HEADERS, [BODY])
        try:
            body = await answer.read(1 << 20)
            if answer.status == 200 and json.loads(body)["object"] == "text_completion":
                self._note_answered()
            else:
                self._wrong.append(f"HTTP {answer.status}: {body[:100]!r}")
        finally:
            answer.abort()

    def _note_answered(self) -> None:
        self.answered += 1
        if self.answered == WARM:
            self.is_warm.set()

    def report(self) -> dict[str, Any]:
        return {"answered": self.answered, "wrong": self._wrong, "connects": self._upstream.stats().connects}


class Legs:
    """Both kinds, and the lines that say what to do."""

    def __init__(self, honest: int, hostile: Sequence[int]) -> None:
        self._before = asyncio.all_tasks()
        self._hostile = [Origin("127.0.0.1", port) for port in hostile]
        # Those who say nothing are given up soon, so that others get a turn.
        self._upstream = MuxUpstream(PooledUpstream(connect_timeout_s=1.0), ping_s=0.5)
        self._own = MuxUpstream(PooledUpstream())
        self._honest = Honest(self._own, Origin("127.0.0.1", honest))
        self._asking = asyncio.create_task(self._honest.run())
        self._attacked: list[asyncio.Task[None]] = []
        self._wrong: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word = (await reader.readline()).decode().strip()
        if word:  # else somebody asks whether we listen
            writer.write(json.dumps(await getattr(self, f"_{word}")()).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _wait(self) -> dict[str, Any]:
        await self._honest.is_warm.wait()
        return {}

    async def _go(self) -> dict[str, Any]:
        self._attacked = [asyncio.create_task(self._send_on(Random(n), n)) for n in range(CLIENTS)]
        return {}

    async def _stop(self) -> dict[str, Any]:
        for task in self._attacked:
            task.cancel()
        await asyncio.gather(*self._attacked, return_exceptions=True)
        await asyncio.sleep(CLOSES_WITHIN_S)
        await self._honest.stop(self._asking)
        found = self._honest.report()
        found["wrong"] += self._wrong
        held = {"legs": self._upstream.stats().busy}
        await self._upstream.aclose()
        held["tasks"] = len(asyncio.all_tasks() - self._before - {asyncio.current_task()})
        return found | {"held": held}

    async def _send_on(self, random: Random, number: int) -> None:
        origin = self._hostile[number % len(self._hostile)]
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._send(origin, random)
            except (BatonError, TimeoutError):
                await asyncio.sleep(0)
            except Exception as error:
                self._wrong.append(repr(error))

    async def _send(self, origin: Origin, random: Random) -> None:
        self._upstream.offer(origin, True)  # it may have refused
        body = random.choice((b"", BODY, BODY, BODY, LARGE))
        answer = await self._upstream.send(origin, "POST", "/v1/completions", HEADERS, [body])
        try:
            await self._read(answer, random)
        finally:
            answer.abort()

    async def _read(self, answer: Answer, random: Random) -> None:
        way = random.randrange(4)
        if way == 0:
            await answer.read(1 << 20)
        elif way == 1:
            await answer.pump(lambda data: True)
        elif way == 2:
            await answer.head()  # and leave
        else:
            await answer.head()
            await asyncio.sleep(random.random() / 10)
            while await answer.chunk():
                pass


async def main(port: int, honest: int, *hostile: int) -> None:
    legs = Legs(honest, hostile)
    server = await asyncio.start_server(legs.serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        uvloop.run(main(*map(int, sys.argv[1:])))
