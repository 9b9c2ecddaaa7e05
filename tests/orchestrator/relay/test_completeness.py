"""Answers are complete by what is in them: else another worker makes them, or the client gets an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from tests.orchestrator.fakes import DONE, FINISH, JSON, LAST, SSE, FakeCluster, event, run_scripted, token

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
TWO = ("prefill", "decode", "decode")
PARAMS = {"remote_host": "10.0.0.1", "remote_port": 5600, "remote_block_ids": [[1]]}
USAGE = {"prompt_tokens": 21, "prompt_tokens_details": {"cached_tokens": 21, "created_cache_tokens": 0}}


def whole(**document: Any) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, json.dumps({"id": "c", "usage": USAGE} | document).encode(), JSON)

    return worker


def streaming(*chunks: bytes) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, SSE)
        for chunk in chunks:
            await reply.chunk(chunk)

    return worker


def choice(reason: str | None) -> dict[str, Any]:
    return {"index": 0, "message": {"content": "abc"}, "finish_reason": reason}


BODIES = {
    "no end": whole(choices=[choice(None)]),
    "no choice": whole(choices=[]),
    "abort": whole(choices=[choice("abort")]),
    "error reason": whole(choices=[choice("error")]),
    "error": whole(error={"message": "boom", "code": 500}),
    "object": whole(object="error", message="boom", code=500),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_not_whole_is_made_elsewhere(kind: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), BODIES[kind])
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert json.loads(answer.sent)["choices"][0]["message"]["content"] == "abc"

    run_scripted(test, roles=TWO)


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_not_whole_is_an_error(kind: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), BODIES[kind])
        answer = await cluster.ask(CHAT)
        assert answer.status in (500, 502)
        assert "message" in json.loads(answer.sent)["error"]

    run_scripted(test)


def test_an_error_of_the_client_in_a_200_is_the_clients() -> None:
    async def test(cluster: FakeCluster) -> None:
        refused = whole(error={"message": "too long", "code": 400})
        cluster.upstream.serve(cluster.origin("decode/0"), refused)
        answer = await cluster.ask(CHAT)
        assert (answer.status, json.loads(answer.sent)["error"]["message"]) == (400, "too long")
        assert len(cluster.legs("decode")) == 1

    run_scripted(test, roles=TWO)


STREAMS = {
    "no end": [token("a"), token("b"), DONE],
    "no end, with usage": [token("a"), event({"choices": [], "usage": USAGE}), DONE],
    "abort": [token("a"), event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}), DONE],
    "error": [token("a"), b'event: error\ndata: {"message":"boom"}\n\n', DONE],
    "object": [token("a"), event({"object": "error", "message": "boom", "code": 500}), DONE],
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_not_whole_ends_with_an_error_event(kind: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), streaming(*STREAMS[kind]))
        answer = await cluster.ask(STREAM)
        *events, failed, done, end = answer.sent.split(b"\n\n")
        assert events[0] + b"\n\n" == token("a")
        assert "error" in json.loads(failed.removeprefix(b"data: "))
        assert (done, end) == (b"data: [DONE]", b"")
        assert answer.sent.count(b"[DONE]") == 1

    assert run_scripted(test).telemetry.records[0].error_code


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_says_nothing_is_made_elsewhere(kind: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        chunks = [
            chunk for chunk in STREAMS[kind][1:] if b'"content"' not in chunk and b'"usage"' not in chunk
        ]
        cluster.upstream.serve(cluster.origin("decode/0"), streaming(*chunks))
        answer = await cluster.ask(STREAM)
        assert answer.sent == token("a") + token("b") + token("c") + LAST

    run_scripted(test, roles=TWO)


@pytest.mark.parametrize("is_stream", [False, True])
def test_transfer_parameters_of_an_answer_stay_here(is_stream: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        last = event(
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "kv_transfer_params": PARAMS}
        )
        worker = (
            streaming(token("a"), last, DONE)
            if is_stream
            else whole(choices=[choice("stop")], kv_transfer_params=PARAMS)
        )
        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        answer = await cluster.ask(STREAM if is_stream else CHAT)
        assert answer.status == 200
        assert b"10.0.0.1" not in answer.sent

    run_scripted(test)


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_prefill_worker_tells_what_was_added_to_the_prefix_cache(is_stream: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        prefill = cluster.workers.prefill

        async def tells(request: MemoryRequest, reply: MemoryReply) -> None:
            answer = reply.answer

            def with_usage(status: int, body: bytes, headers: dict[bytes, bytes]) -> None:
                details = {"cached_tokens": 0, "created_cache_tokens": 384}
                usage = {"prompt_tokens": 430, "prompt_tokens_details": details}
                answer(status, json.dumps(json.loads(body) | {"usage": usage}).encode(), headers)

            reply.answer = with_usage  # type: ignore[method-assign, assignment]
            await prefill(request, reply)

        cluster.upstream.serve(cluster.origin("prefill/0"), tells)
        told = event({"choices": [], "usage": USAGE})
        worker = streaming(token("a"), FINISH, told, DONE) if is_stream else whole(choices=[choice("stop")])
        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        asked = STREAM | {"stream_options": {"include_usage": True}} if is_stream else CHAT
        sent = (await cluster.ask(asked)).sent
        assert b'"created_cache_tokens":384' in sent.replace(b": ", b":")

    run_scripted(test)


def test_an_answer_that_cannot_be_used_is_not_worth_a_retry() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), whole(choices=[]))
        answer = await cluster.ask(CHAT)
        assert (answer.status, answer.answer_headers[b"x-should-retry"]) == (502, b"false")

    run_scripted(test)
