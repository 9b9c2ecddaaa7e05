"""Embeddings through the data plane: what the worker is asked for, what the client gets, what is held."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy
import pytest

from orchestrator.api.embeddings import MAX_INLINE_BYTES, Layout
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import JSON, FakeCluster, FakeExchange, read

PATH = "/v1/embeddings"
ASK: dict[str, Any] = {"model": "m", "input": ["a", "b"], "dimensions": 3, "unknown": {"x": 1}}
OCTETS = [(b"accept", b"application/octet-stream")]
SMALL = numpy.array([[0.1, 0.2, 0.3], [-1.5, 0.0, 1e-7]], "<f4")
LARGE = numpy.linspace(-1, 1, 2 * MAX_INLINE_BYTES[Layout.FLOATS], dtype="<f4").reshape(2, -1)

Test = Callable[[FakeCluster], Awaitable[None]]


class Worker:
    """Answers as vLLM does, in the form that it is asked for."""

    def __init__(self, vectors: Any = SMALL, content: bytes | None = None) -> None:
        self.vectors = vectors
        self.content = content  # instead of vectors
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, request: MemoryRequest, reply: MemoryReply) -> None:
        self.asked.set()
        await self.go.wait()
        encoding = read(request).get("encoding_format", "float")
        reply.answer(200, self.content or document(self.vectors, encoding), JSON)


def document(vectors: Any, encoding: str) -> bytes:
    encode = numpy.ndarray.tolist if encoding == "float" else _base64
    items = [{"index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)]
    return json.dumps({"object": "list", "data": items, "usage": {"prompt_tokens": 4}}).encode()


def _base64(vector: Any) -> str:
    return base64.b64encode(vector.tobytes()).decode()


def run(test: Test, worker: Worker, roles: Sequence[Any] = ("both",), **options: Any) -> None:
    """At its end nothing may be held."""

    async def main() -> None:
        cluster = FakeCluster(roles=roles, **options)
        for one in cluster.registry.workers:
            cluster.upstream.serve(one.origin, worker)
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def vectors_in(answer: FakeExchange) -> Any:
    assert answer.status == 200, answer.sent
    return numpy.array([item["embedding"] for item in json.loads(answer.sent)["data"]], "<f4")


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["json", "msgpack"])
@pytest.mark.parametrize("vectors", [SMALL, LARGE], ids=["small", "large"])
def test_floats_are_made_of_the_workers_base64(transport: str, vectors: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(ASK, path=PATH)
        assert vectors_in(answer).tobytes() == vectors.tobytes()
        assert json.loads(answer.sent)["usage"] == {"prompt_tokens": 4}
        assert answer.answer_headers[b"content-type"] == b"application/json"
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"
        assert answer.answer_headers[b"x-baton-kv"] == b"local"
        (leg,) = cluster.legs("both")
        assert read(leg) == ASK | {"encoding_format": "base64"}

    run(test, Worker(vectors), transport=transport)


@pytest.mark.processes
@pytest.mark.parametrize("vectors", [SMALL, LARGE], ids=["small", "large"])
def test_bytes_are_the_workers_numbers(vectors: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        raw = await cluster.ask(ASK, path=PATH, headers=OCTETS)
        assert raw.answer_headers[b"content-type"] == b"application/octet-stream"
        assert json.loads(raw.answer_headers[b"x-baton-embeddings"])["shape"] == list(vectors.shape)
        described = await cluster.ask(ASK | {"encoding_format": "bytes"}, path=PATH)
        assert json.loads(described.answer_headers[b"metadata"])["data"][1]["end"] == vectors.nbytes
        assert raw.sent == described.sent == vectors.tobytes()

    run(test, Worker(vectors))


@pytest.mark.parametrize("fields", [{"encoding_format": "base64"}, {"embed_dtype": "float32"}])
def test_the_workers_own_answer_keeps_every_byte(fields: dict[str, str]) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(ASK | fields, path=PATH)
        assert answer.sent == document(SMALL, fields.get("encoding_format", "float"))
        (leg,) = cluster.legs("both")
        assert read(leg) == ASK | fields

    run(test, Worker())


def test_nothing_is_streamed_whatever_the_request_says() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(ASK | {"stream": True}, path=PATH)
        assert vectors_in(answer).tobytes() == SMALL.tobytes()

    run(test, Worker())


def test_without_a_both_pool_a_decode_worker_is_asked() -> None:
    async def test(cluster: FakeCluster) -> None:
        await cluster.ask(ASK, path=PATH)
        assert len(cluster.legs("decode")) == 1

    run(test, Worker(), roles=("prefill", "decode"))


@pytest.mark.parametrize("fields", [{}, {"encoding_format": "bytes"}, {"encoding_format": "base64"}])
def test_a_refusal_is_the_workers(fields: dict[str, str]) -> None:
    refusal = b'{"error":{"message":"no embeddings here","type":"BadRequestError","param":null,"code":400}}'

    async def refuse(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(400, refusal, JSON)

    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("both/0"), refuse)
        answer = await cluster.ask(ASK | fields, path=PATH)
        assert (answer.status, answer.sent) == (400, refusal)

    run(test, Worker())


@pytest.mark.processes
@pytest.mark.parametrize(
    "content", [b"{}", b'{"data":[{"embedding":"AAA="}]}', b"[" + b"0," * 100_000 + b"0]"]
)
def test_a_broken_answer_is_a_502(content: bytes) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(ASK, path=PATH)
        assert answer.status == 502
        assert json.loads(answer.sent)["error"]["code"] == "worker_garbage"

    run(test, Worker(content=content))


def test_a_client_that_leaves_while_the_worker_computes_stops_it() -> None:
    worker = Worker()

    async def test(cluster: FakeCluster) -> None:
        worker.go.clear()
        exchange = FakeExchange(json.dumps(ASK).encode(), path=PATH)
        request = asyncio.create_task(cluster.serve(exchange))
        await worker.asked.wait()
        exchange.leave()
        await request
        assert exchange.is_aborted

    run(test, worker)


def test_a_client_that_leaves_while_the_floats_are_made_is_let_go() -> None:
    async def test(cluster: FakeCluster) -> None:
        exchange = FakeExchange(json.dumps(ASK).encode(), path=PATH)

        async def leave(*args: Any) -> Any:
            exchange.leave()
            await asyncio.sleep(0)
            raise AssertionError("the request goes on")

        cluster.plane.endpoints[PATH]._embeddings.answer = leave  # type: ignore[attr-defined]
        await cluster.serve(exchange)
        assert exchange.is_aborted
        assert exchange.sent == b""

    run(test, Worker())
