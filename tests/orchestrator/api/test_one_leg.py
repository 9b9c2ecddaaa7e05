"""Paths that one worker serves: what it gets, what its client gets, and what no client may say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.api.one_leg import STREAMED, WHOLE
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import JSON, SSE, FakeCluster

ANSWER = b'{"object":"list","data":[{"score":0.5}]}'
EVENTS = b'data: {"choices":[{"index":0,"token_ids":[5],"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
DOCUMENT: dict[str, Any] = {"model": "m", "text_1": "a", "text_2": ["b", 1.50]}


class Worker:
    """It answers with the same, and keeps what it was asked."""

    def __init__(self, status: int = 200, answer: bytes = ANSWER, headers: Any = JSON) -> None:
        self.status, self.answer, self.headers = status, answer, headers
        self.asked: list[MemoryRequest] = []

    async def __call__(self, request: MemoryRequest, reply: MemoryReply) -> None:
        self.asked.append(request)
        reply.answer(self.status, self.answer, self.headers)


def run(test: Callable[[FakeCluster], Awaitable[None]], worker: Worker, **options: Any) -> None:
    async def main() -> None:
        cluster = FakeCluster(**options)
        for name in ("prefill/0", "decode/0"):
            cluster.upstream.serve(cluster.origin(name), worker)
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_they_are_all_in_the_table() -> None:
    assert {*WHOLE, *STREAMED} <= ENDPOINTS.keys()


@pytest.mark.parametrize("path", [*WHOLE, *STREAMED])
def test_one_worker_is_asked_and_its_answer_relayed(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(DOCUMENT, path=path)
        assert (answer.status, answer.sent) == (200, ANSWER)
        assert [request.target for request in worker.asked] == [path]
        assert json.loads(worker.asked[0].body) == DOCUMENT
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"

    worker = Worker()
    run(test, worker)


@pytest.mark.parametrize("path", [*WHOLE, *STREAMED])
@pytest.mark.parametrize(
    "extra",
    [
        {"kv_transfer_params": {"remote_host": "evil"}},
        {"ec_transfer_params": {"remote_host": "evil"}},
        {"sampling_params": {"n": 1, "extra_args": {"kv_transfer_params": "", "x": 1}}},
        {"vllm_xargs": {"kv_transfer_params": ""}},
    ],
)
def test_nothing_of_a_hand_off_is_taken_from_a_client(path: str, extra: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(DOCUMENT | extra, path=path)).status == 200
        assert b"transfer_params" not in bytes(worker.asked[0].body)

    worker = Worker()
    run(test, worker)


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_is_relayed_as_it_is(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(DOCUMENT | {"stream": True}, path=path)
        assert (answer.status, answer.sent) == (200, EVENTS)

    run(test, Worker(answer=EVENTS, headers=SSE))


@pytest.mark.parametrize("path", [*WHOLE, *STREAMED])
def test_what_a_worker_does_not_have_is_said(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(DOCUMENT, path=path)
        assert answer.status == 404
        assert "error" in json.loads(answer.sent)

    run(test, Worker(404, b'{"error":{"message":"no such API","code":404}}'))


@pytest.mark.parametrize("path", WHOLE)
def test_an_answer_that_is_no_json_is_the_workers_fault(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(DOCUMENT, path=path)).status == 502

    run(test, Worker(answer=b"<html>"))


@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
def test_forms_that_are_no_json_are_refused_before_a_worker_is_asked(form: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(DOCUMENT | {"encoding_format": form}, path="/pooling")
        assert (answer.status, json.loads(answer.sent)["error"]["param"]) == (400, "encoding_format")
        assert not worker.asked

    worker = Worker()
    run(test, worker)
