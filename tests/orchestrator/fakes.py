"""A client and workers in memory: the data plane between them is real."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from orchestrator.app import Core, ProcessContext
from orchestrator.config.keys import KeyRing
from orchestrator.config.options import (
    DEFAULT_SEATS,
    Config,
    HealthConfig,
    LimitsConfig,
    ModelConfig,
    OrchestratorConfig,
    PoolConfig,
    QueueConfig,
    RoutingConfig,
)
from orchestrator.errors import ClientGone
from orchestrator.http.exchange import Exchange
from orchestrator.http.ids import IdSource, request_id_from
from orchestrator.relay.scope import RequestScope
from orchestrator.transport.base import Origin
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest, MemoryUpstream
from orchestrator.wire.headers import fields_of
from orchestrator.wire.info import END_PATH, Role
from orchestrator.workers.worker import Worker

JSON = {b"content-type": b"application/json"}
SSE = {b"content-type": b"text/event-stream; charset=utf-8"}
DONE = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def token(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


# The event with which a choice ends, and what a stream ends with.
FINISH = event({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]})
LAST = FINISH + DONE


def usage(prompt: int = 21, cached: int = 21) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached}}


class FakeExchange(Exchange):
    """A request whose client can leave, or stop reading, whenever a test says so."""

    def __init__(
        self,
        body: bytes,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        headers: Sequence[tuple[bytes, bytes]] = (),
        content_type: bytes | None = b"application/json",
    ) -> None:
        self.method = method
        self.headers = list(headers)
        if content_type is not None:
            self.headers.append((b"content-type", content_type))
        self.content_length = None
        self.body_size = 0
        self.is_counted = False
        self._path = path
        self._request_id = request_id_from(self.headers, IdSource(random.Random(0)))
        self.is_gone = False
        self.is_started = False
        self.is_complete = False
        self.is_aborted = False
        self.is_writable = True
        self.status = 0
        self.answer_headers: dict[bytes, bytes] = {}
        self.chunks: list[bytes] = []
        self.fed = asyncio.Event()
        self._body = body
        self._on_leave: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None

    @property
    def path(self) -> str:
        return self._path

    @property
    def query(self) -> bytes:
        return b""

    @property
    def client(self) -> None:
        return None

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def sent(self) -> bytes:
        return b"".join(self.chunks)

    # --- the client's side

    def leave(self) -> None:
        callback, self._on_leave = self._on_leave, None
        self.is_gone = True
        if callback is not None and not self.is_complete:
            callback()

    def read_again(self) -> None:
        self.is_writable = True
        if self._on_writable is not None:
            self._on_writable()

    # --- the exchange

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        self._on_leave = callback

    async def read_body(self) -> bytes:
        await asyncio.sleep(0)
        if self.is_gone:
            raise ClientGone("the client left")
        return self._body

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        self.start(status, headers)
        self.finish(body)

    def start(self, status: int, headers: bytes) -> None:
        assert not self.is_started
        self.is_started = True
        self.status = status
        self.answer_headers = dict(fields_of(headers))

    def feed(self, chunk: bytes) -> bool:
        assert self.is_started
        assert not self.is_complete
        if not self.is_gone:
            self.chunks.append(chunk)
        self.fed.set()
        return self.is_writable and not self.is_gone

    async def drain(self) -> None:
        raise NotImplementedError  # the data plane uses on_writable

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._on_writable = callback

    def finish(self, chunk: bytes = b"") -> None:
        self.feed(chunk)
        self.is_complete = True

    def abort(self) -> None:
        self.is_aborted = True


class FakeWorkers:
    """What vLLM workers do on the wire: prefill pins blocks, a decode leg with the hand-off frees them."""

    def __init__(self) -> None:
        self.pinned: set[str] = set()
        self.decoding = 0  # decode legs that run now
        self.tokens = ["a", "b", "c"]
        self.step = 1  # turns of the event loop per prefill and per token
        self._ids = itertools.count()

    async def prefill(self, request: MemoryRequest, reply: MemoryReply) -> None:
        for _ in range(self.step):
            await asyncio.sleep(0)
        if reply.is_over:  # vLLM frees the blocks of a prefill whose connection was dropped
            return
        name = f"r{next(self._ids)}"
        self.pinned.add(name)
        reply.answer(200, json.dumps({"choices": [], "kv_transfer_params": params_of(name)}).encode(), JSON)

    async def decode(self, request: MemoryRequest, reply: MemoryReply) -> None:
        document = read(request)
        params = document.get("kv_transfer_params")
        if params is not None:  # the pull starts before anybody can cancel it
            self.pinned.discard(params["remote_request_id"])
        self.decoding += 1
        try:
            await self._answer(document, reply)
        finally:
            self.decoding -= 1

    async def _answer(self, document: dict[str, Any], reply: MemoryReply) -> None:
        if not document.get("stream"):
            await asyncio.sleep(0)
            choice = {"message": {"content": "".join(self.tokens)}, "finish_reason": "stop"}
            reply.answer(200, json.dumps({"choices": [choice], "usage": usage()}).encode(), JSON)
            return
        reply.head(200, SSE)
        for text in self.tokens:
            for _ in range(self.step):
                await asyncio.sleep(0)
            await reply.chunk(token(text))
        await reply.chunk(FINISH)
        if (document.get("stream_options") or {}).get("include_usage"):
            await reply.chunk(event({"choices": [], "usage": usage()}))
        await reply.chunk(DONE)


def params_of(name: str) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "e",
        "remote_block_ids": [[1]],
        "remote_request_id": name,
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "remote_prefill_cached_tokens": 16,
    }


def leg_name(request: MemoryRequest) -> str:
    """By this name a leg is ended."""
    headers = dict(request.headers)
    return (headers.get(b"x-baton-leg") or headers.get(b"x-request-id", b"")).decode()


def read(request: MemoryRequest) -> dict[str, Any]:
    """A leg's document, as a worker decodes it."""
    if dict(request.headers).get(b"x-msgpack") == b"1":
        return msgspec.msgpack.decode(request.body)
    return json.loads(request.body)


class FakeUpstream(MemoryUpstream):
    """Workers that cannot be asked to end a leg, but for those that are said to."""

    def serve(
        self, origin: Origin, handler: LegHandler, *, connect_s: float = 0.0, ends_legs: bool = False
    ) -> None:
        async def without(request: MemoryRequest, reply: MemoryReply) -> None:
            if request.target == END_PATH:
                reply.answer(404, b'{"detail":"Not Found"}', JSON)
            else:
                await handler(request, reply)

        super().serve(origin, handler if ends_legs else without, connect_s=connect_s)


class FakeCluster:
    """The data plane over workers in memory. Made inside a running event loop."""

    def __init__(
        self,
        *,
        roles: Sequence[Role] = ("prefill", "decode"),
        transport: str = "json",
        limits: LimitsConfig | None = None,
        routing: RoutingConfig | None = None,
        health: HealthConfig | None = None,
        seats: int = DEFAULT_SEATS,
        queue: QueueConfig | None = None,
        keys: KeyRing | None = None,
        credential: str | None = None,
        tokenizes_once: bool = True,
        max_kept_bytes: int = 1024 * 1024,
        kv_missing: str = "warn",
        models: Sequence[str] = ("m",),
        adapters: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        ranks: int = 1,
    ) -> None:
        """Each of the models has such pools of its own; `adapters` are those that the first one lists."""
        limits = (limits or LimitsConfig()).model_copy(update={"max_kept_bytes": max_kept_bytes})
        options = {"tokenize_once": tokenizes_once, "kv_missing": kv_missing}
        config = Config(
            orchestrator=OrchestratorConfig(limits=limits, queue=queue or QueueConfig()),
            models=[
                ModelConfig(
                    name=name, adapters=[] if at else [*adapters], **_pools(roles, seats, 1 + 100 * at, ranks)
                )
                for at, name in enumerate(models)
            ],
            aliases=dict(aliases or {}),
            routing=(routing or RoutingConfig()).model_copy(update=options),
            health=health or HealthConfig(),
        )
        self.config = config
        self.upstream = FakeUpstream()
        self.workers = FakeWorkers()
        self.core = Core(
            config,
            self.upstream,
            transport=transport,
            credential=credential,
            context=ProcessContext(index=0, started=0.0, keys=keys, row=None, loads=None),
            clock=asyncio.get_running_loop().time,
            rng=random.Random(1),
        )
        self.registry = self.core.registry
        self.telemetry = self.core.telemetry
        self.admission = self.core.admission
        self.flow = self.core.flow
        self.plane = self.core.data_plane
        for worker in self.registry.workers:
            self.registry.judge.mark_ready(worker)
            is_prefill = worker.address.role == "prefill"
            self.upstream.serve(worker.origin, self.workers.prefill if is_prefill else self.workers.decode)

    def worker(self, name: str, model: str = "m") -> Worker:
        return next(worker for worker in self.registry.workers if worker.name == f"{model}/{name}")

    def origin(self, name: str) -> Origin:
        return self.worker(name).origin

    def legs(self, role: str) -> list[MemoryRequest]:
        origins = {worker.origin for worker in self.registry.workers if worker.address.role == role}
        return [request for request in self.upstream.requests if request.origin in origins]

    async def serve(self, exchange: FakeExchange) -> FakeExchange:
        await RequestScope(self.plane, exchange).run()
        return exchange

    async def ask(self, document: Any, **options: Any) -> FakeExchange:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return await self.serve(FakeExchange(body, **options))

    async def aclose(self) -> None:
        await self.core.aclose()

    def assert_at_rest(self) -> None:
        """Nothing is held: no seat, no leg, no pinned block, no open request."""
        assert [worker.in_flight for worker in self.registry.workers] == [0] * len(self.registry.workers)
        assert self.workers.pinned == set()
        assert self.workers.decoding == 0
        assert self.upstream.stats().busy == 0
        assert not self.plane.open
        assert self.telemetry.in_flight == 0
        assert self.admission.admitted == 0
        assert (self.plane.held.bodies, self.plane.held.incoming) == (0, 0)


def _pools(roles: Sequence[Role], seats: int, first: int, ranks: int) -> dict[Role, PoolConfig]:
    """A worker for each, on ports of their own from the first one on."""
    urls: dict[Role, list[str]] = {}
    for port, role in enumerate(roles, start=first):
        urls.setdefault(role, []).append(f"http://127.0.0.1:{port}")
    return {
        role: PoolConfig(urls=found, seats=seats, data_parallel_size=ranks) for role, found in urls.items()
    }


def run_scripted(test: Callable[[FakeCluster], Awaitable[None]], **options: Any) -> FakeCluster:
    """Run a test over a cluster whose decode workers it scripts; they pull nothing, all else is at rest."""

    async def main() -> FakeCluster:
        cluster = FakeCluster(**options)
        await test(cluster)
        cluster.workers.pinned.clear()
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())
