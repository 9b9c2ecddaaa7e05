"""The data plane and its prober, for real, over workers on real sockets that answer in bytes of a test."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from orchestrator.app import Core, ProcessContext
from orchestrator.config.options import Config
from orchestrator.relay.scope import RequestScope
from orchestrator.transport.pool import PooledUpstream
from orchestrator.workers.health import HttpProbe, Prober
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.fakes import FakeExchange, params_of

PATIENCE_S = 30.0
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize")


def page(content: bytes, status: str = "200 OK", fields: str = "content-type: application/json\r\n") -> bytes:
    """An answer with its length."""
    return f"HTTP/1.1 {status}\r\n{fields}content-length: {len(content)}\r\n\r\n".encode() + content


def of_json(document: object, status: str = "200 OK") -> bytes:
    return page(json.dumps(document).encode(), status)


def refused(message: str, status: str = "400 Bad Request", **fields: Any) -> bytes:
    """An error as vLLM writes it."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": int(status[:3])}
    return of_json({"error": error | fields}, status)


def sse(*events: object, done: bool = True) -> bytes:
    content = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    content += b"data: [DONE]\n\n" if done else b""
    return page(content, fields="content-type: text/event-stream\r\n")


class ScriptedWorker:
    """It answers as a worker does, but for what `script` has for a path."""

    def __init__(self, role: str) -> None:
        self.role = role
        # By path: an answer, or what makes one of a body; empty: it closes the connection.
        self.script: dict[str, bytes | Callable[[bytes], bytes]] = {}
        self.requests: list[tuple[str, bytes, bytes]] = []  # path, head and body
        self._ids = itertools.count()
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, stack: contextlib.AsyncExitStack) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        stack.push_async_callback(self._end)
        await stack.enter_async_context(server)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def spoil(self, answer: bytes) -> None:
        """Have it answer so to everything but the probe of its health."""
        self.script |= dict.fromkeys(("/v1/models", "/baton/info", *GENERATING), answer)

    def asked(self, path: str) -> int:
        """How many requests it had there, but for those without content that probes send."""
        return sum(1 for asked, _, body in self.requests if asked == path and body != b"{}")

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
                path = head.split(b" ", 2)[1].decode()
                self.requests.append((path, head, body))
                answer = self._answer(path, body)
                writer.write(answer)
                await writer.drain()
                if not answer or path in self.script:
                    break

    def _answer(self, path: str, body: bytes) -> bytes:
        if path in self.script:
            answer = self.script[path]
            return answer if isinstance(answer, bytes) else answer(body)
        if path in GENERATING:
            return refused("empty") if body == b"{}" else self.generated(path, json.loads(body))
        return _PAGES.get(path, of_json({"detail": "Not Found"}, "404 Not Found"))

    def generated(self, path: str, document: dict[str, Any]) -> bytes:
        if path == "/v1/embeddings":
            item = {"index": 0, "object": "embedding", "embedding": [0.5]}
            return of_json({"object": "list", "data": [item], "usage": {"prompt_tokens": 1}})
        params = document.get("kv_transfer_params") or {}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if params.get("do_remote_decode"):
            transfer = params_of(f"r{next(self._ids)}")
            return of_json({"choices": [choice], "kv_transfer_params": transfer})
        if document.get("stream"):
            delta = {"index": 0, "delta": {"content": "well"}, "finish_reason": None}
            return sse({"choices": [delta]}, {"choices": [{**choice, "delta": {}}]})
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        message = {"role": "assistant", "content": "well"}
        return of_json({"choices": [{**choice, "message": message}], "usage": usage})


_PAGES = {
    "/health": page(b""),
    "/v1/models": of_json({"data": [{"id": "m", "max_model_len": 4096}]}),
}


class Site:
    """Scripted workers behind an orchestrator that probes them."""

    def __init__(self, workers: list[ScriptedWorker], health: Mapping[str, Any], key: str | None) -> None:
        pools = {
            role: {"urls": [w.url for w in workers if w.role == role]}
            for role in ("prefill", "decode", "both")
        }
        pools = {role: pool for role, pool in pools.items() if pool["urls"]}
        config = Config.model_validate({"models": [{"name": "m", **pools}], "health": dict(health)})
        loop = asyncio.get_running_loop()
        self.core = Core(
            config,
            PooledUpstream(),
            transport="json",
            credential=key,
            context=ProcessContext(index=0, started=0.0, keys=None, row=None, loads=None),
            clock=loop.time,
            rng=random.Random(1),
        )
        self.registry = self.core.registry
        self.probe = HttpProbe(key)
        self.prober = Prober(self.registry, self.probe, random=random.Random(1), time=loop.time)
        self._moved = asyncio.Event()
        self.registry.news.moved.add(lambda worker, event: self._moved.set())
        self._by_url = {worker.url: worker for worker in workers}

    def known(self, worker: ScriptedWorker) -> Worker:
        return next(known for known in self.registry.workers if known.address.url == worker.url)

    async def wait_state(self, worker: ScriptedWorker, *states: WorkerState) -> WorkerState:
        known = self.known(worker)
        async with asyncio.timeout(PATIENCE_S):
            while known.state not in states:
                self._moved.clear()
                await self._moved.wait()
        return known.state

    async def ask(self, document: dict[str, Any], path: str = "/v1/chat/completions") -> FakeExchange:
        exchange = FakeExchange(json.dumps({"model": "m"} | document).encode(), path)
        async with asyncio.timeout(PATIENCE_S):
            await RequestScope(self.core.data_plane, exchange).run()
        return exchange

    async def aclose(self) -> None:
        await self.prober.aclose()
        await self.probe.aclose()
        await self.core.aclose()


@contextlib.asynccontextmanager
async def site(
    *roles: str, health: Mapping[str, Any] | None = None, key: str | None = "ours", waits: bool = True
) -> AsyncIterator[tuple[Site, list[ScriptedWorker]]]:
    """Workers of these roles, in this order, all of them ready if it `waits`."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [ScriptedWorker(role) for role in roles]
        for worker in workers:
            await worker.serve(stack)
        made = Site(workers, health or {}, key)
        made.prober.start()
        try:
            for worker in workers if waits else ():
                await made.wait_state(worker, WorkerState.READY)
            yield made, workers
        finally:
            await made.aclose()


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())
