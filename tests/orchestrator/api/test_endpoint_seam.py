"""The seam for endpoints, by one whose errors, streams and answers have other forms than OpenAI's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.api.base import Content, Conversion, Endpoint
from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.api.view import RequestView
from orchestrator.errors import BatonError, WorkerGarbage
from orchestrator.http.exchange import Exchange
from orchestrator.loop.offload import Offload
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.headers import header_block
from tests.orchestrator.fakes import JSON, SSE, FakeCluster, FakeExchange, token

PATH = "/v1/messages"
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Shout(Conversion):
    """Makes a document of one string in capitals of a chat's answer."""

    async def convert(self, content: bytes) -> Content:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except KeyError as error:
            raise WorkerGarbage("there is no message") from error
        return header_block([(b"content-type", b"text/plain")]), text.upper().encode()


class Messages(Endpoint):
    """Two legs, as chats have them, with errors of a form of their own; `x-shout` asks for another answer."""

    def __init__(self, offload: Offload) -> None:
        super().__init__(can_continue=False)

    def adapt(self, view: RequestView, exchange: Exchange) -> tuple[RequestView, Conversion | None]:
        return view, Shout() if exchange.header(b"x-shout") else None

    def error(self, error: BatonError) -> tuple[list[tuple[bytes, bytes]], bytes]:
        return [(b"content-type", b"application/json"), (b"x-code", error.code.encode())], _document(error)

    def error_event(self, error: BatonError) -> bytes:
        return b"event: error\ndata: %b\n\n" % _document(error)


def _document(error: BatonError) -> bytes:
    return json.dumps({"type": "error", "error": {"type": error.code}}).encode()


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, and one entry in the table."""
    monkeypatch.setitem(ENDPOINTS, PATH, Messages)


def run(test: Callable[[FakeCluster], Awaitable[None]]) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        (ASK | {"model": "unknown"}, 404, "model_not_found"),
        (ASK | {"model": 5}, 400, "invalid_request"),
    ],
)
def test_an_endpoint_has_its_own_form_of_errors(document: dict[str, Any], status: int, code: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(document, path=PATH)
        assert answer.status == status
        assert json.loads(answer.sent) == {"type": "error", "error": {"type": code}}
        assert answer.answer_headers[b"x-code"] == code.encode()

    run(test)


def test_a_worker_that_is_gone_is_told_of_in_that_form() -> None:
    async def test(cluster: FakeCluster) -> None:
        for worker in cluster.registry.workers:
            cluster.registry.judge.mark_gone(worker, "refused")
        answer = await cluster.ask(ASK, path=PATH)
        assert (answer.status, json.loads(answer.sent)["error"]["type"]) == (503, "no_worker")

    run(test)


def test_a_stream_that_breaks_ends_with_its_own_event() -> None:
    async def breaks(request: MemoryRequest, reply: MemoryReply) -> None:
        cluster_workers.pinned.clear()
        reply.head(200, SSE)
        await reply.chunk(token("a"))
        reply.cut_short()

    async def test(cluster: FakeCluster) -> None:
        nonlocal cluster_workers
        cluster_workers = cluster.workers
        cluster.upstream.serve(cluster.origin("decode/0"), breaks)
        answer = await cluster.ask(ASK | {"stream": True}, path=PATH)
        assert answer.status == 200
        first, last = answer.sent.split(b"\n\n")[:2]
        assert first + b"\n\n" == token("a")
        assert last.startswith(b'event: error\ndata: {"type": "error"')
        assert answer.is_complete

    cluster_workers: Any = None
    run(test)


def test_it_makes_its_own_answer_of_the_workers() -> None:
    async def test(cluster: FakeCluster) -> None:
        exchange = FakeExchange(json.dumps(ASK).encode(), path=PATH, headers=[(b"x-shout", b"1")])
        await cluster.serve(exchange)
        assert exchange.sent == b"ABC"
        assert exchange.answer_headers[b"content-type"] == b"text/plain"
        assert [len(cluster.legs(role)) for role in ("prefill", "decode")] == [1, 1]

    run(test)


def test_what_cannot_be_converted_is_the_workers_fault() -> None:
    async def other(request: MemoryRequest, reply: MemoryReply) -> None:
        cluster_workers.pinned.clear()
        reply.answer(200, b'{"choices":[{}],"usage":{}}', JSON)

    async def test(cluster: FakeCluster) -> None:
        nonlocal cluster_workers
        cluster_workers = cluster.workers
        cluster.upstream.serve(cluster.origin("decode/0"), other)
        exchange = FakeExchange(json.dumps(ASK).encode(), path=PATH, headers=[(b"x-shout", b"1")])
        await cluster.serve(exchange)
        assert (exchange.status, json.loads(exchange.sent)["error"]["type"]) == (502, "worker_garbage")

    cluster_workers: Any = None
    run(test)
