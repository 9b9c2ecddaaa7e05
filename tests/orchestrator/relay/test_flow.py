from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.relay.relayed import TO_WORKERS, relayed_to_workers
from orchestrator.telemetry.counters import FallbackReason
from orchestrator.telemetry.record import Path
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import Encoding, WorkerInfo
from orchestrator.wire.usage import Kv
from orchestrator.workers.introduction import Introduction
from tests.orchestrator.fakes import (
    DONE,
    FINISH,
    JSON,
    LAST,
    SSE,
    FakeCluster,
    FakeExchange,
    event,
    leg_name,
    params_of,
    read,
    token,
    usage,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
REFUSAL = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'

Test = Callable[[FakeCluster], Awaitable[None]]


TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def run(test: Test, **options: Any) -> FakeCluster:
    """Run a test over a cluster of its own; at its end nothing may be held."""

    async def main() -> FakeCluster:
        cluster = FakeCluster(**options)
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


def answering(
    status: int, body: bytes, headers: dict[bytes, bytes] = JSON
) -> Callable[[MemoryRequest, MemoryReply], Awaitable[None]]:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(status, body, headers)

    return worker


# --- two legs -----------------------------------------------------------------------------------


def test_a_request_goes_through_both_workers() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert json.loads(answer.sent)["choices"][0]["message"]["content"] == "abc"
        (prefill,), (decode,) = cluster.legs("prefill"), cluster.legs("decode")
        assert read(prefill)["max_tokens"] == 1
        assert read(prefill)["kv_transfer_params"]["do_remote_decode"] is True
        expected = params_of("r0")
        del expected["remote_prefill_cached_tokens"]
        assert read(decode) == CHAT | {"kv_transfer_params": expected}

    cluster = run(test)
    (record,) = cluster.telemetry.records
    assert (record.path, record.kv, record.status) == (Path.DISAGGREGATED, Kv.TRANSFERRED, 200)
    assert (record.prefill_worker, record.decode_worker) == ("m/prefill/0", "m/decode/0")


def test_the_client_gets_the_prefill_workers_cached_tokens() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(CHAT)
        assert json.loads(answer.sent)["usage"] == usage(21, 16)
        assert answer.answer_headers[b"x-baton-kv"] == b"transferred"

    run(test)


def test_a_recompute_is_seen() -> None:
    async def test(cluster: FakeCluster) -> None:
        body = json.dumps({"choices": [{"finish_reason": "stop"}], "usage": usage(21, 0)}).encode()
        cluster.upstream.serve(cluster.origin("decode/0"), answering(200, body))
        answer = await cluster.ask(CHAT)
        assert answer.answer_headers[b"x-baton-kv"] == b"recomputed"
        cluster.workers.pinned.clear()

    assert run(test).telemetry.records[0].kv is Kv.RECOMPUTED


@pytest.mark.parametrize(
    ("policy", "status", "is_logged"), [("warn", 200, True), ("fail", 502, True), ("allow", 200, False)]
)
def test_what_follows_a_recompute_is_the_operators_choice(
    policy: str, status: int, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(cluster: FakeCluster) -> None:
        body = json.dumps({"choices": [{"finish_reason": "stop"}], "usage": usage(21, 0)}).encode()
        cluster.upstream.serve(cluster.origin("decode/0"), answering(200, body))
        answer = await cluster.ask(CHAT)
        assert answer.status == status
        assert len(cluster.legs("decode")) == 1  # failing means failing: it is not computed a third time
        cluster.workers.pinned.clear()

    cluster = run(test, kv_missing=policy)
    assert ("recomputed the KV cache" in caplog.text) == is_logged
    if policy == "fail":
        assert cluster.telemetry.records[0].error_code == "kv_missing"


def test_a_stream_whose_kv_was_recomputed_is_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def test(cluster: FakeCluster) -> None:
        async def recomputes(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            await reply.chunk(token("a") + FINISH + event({"choices": [], "usage": usage(21, 0)}) + DONE)

        cluster.upstream.serve(cluster.origin("decode/0"), recomputes)
        assert (await cluster.ask(STREAM)).sent == token("a") + LAST
        cluster.workers.pinned.clear()

    assert run(test, kv_missing="fail").telemetry.records[0].kv is Kv.RECOMPUTED
    assert "recomputed the KV cache" in caplog.text


@pytest.mark.parametrize("asks", [None, False, True])
def test_a_stream_comes_back_event_for_event(asks: bool | None) -> None:
    options = {} if asks is None else {"stream_options": {"include_usage": asks}}

    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(STREAM | options)
        shown = event({"choices": [], "usage": usage(21, 16)}) if asks else b""
        assert answer.sent == token("a") + token("b") + token("c") + FINISH + shown + DONE
        assert answer.is_complete
        assert answer.answer_headers[b"content-type"] == SSE[b"content-type"]

    assert run(test).telemetry.records[0].kv is Kv.TRANSFERRED


def test_the_head_says_how_it_was_served() -> None:
    async def test(cluster: FakeCluster) -> None:
        headers = (await cluster.ask(CHAT)).answer_headers
        assert headers[b"x-baton-path"] == b"disaggregated"
        assert float(headers[b"x-process-time"]) >= 0
        stages = [stage.split(b";dur=")[0] for stage in headers[b"server-timing"].split(b", ")]
        assert stages == [b"queue", b"prefill", b"decode"]

    run(test)


def test_workers_see_only_what_they_should() -> None:
    sent = [
        (b"authorization", b"Bearer client"),
        (b"cookie", b"c=1"),
        (b"x-msgpack", b"1"),
        (b"x-request-id", b"mine"),
        (b"x-baton-leg", b"theirs"),
        (b"accept", b"*/*"),
        (b"traceparent", TRACE),
        (b"x-forwarded-for", b"1.2.3.4"),
    ]

    async def test(cluster: FakeCluster) -> None:
        await cluster.ask(CHAT, headers=sent)
        legs = [dict(request.headers) for request in cluster.upstream.requests]
        assert legs[0].pop(b"x-request-id") != b"mine"  # of it the engine makes what names pinned blocks
        assert legs[1].pop(b"x-request-id") == b"mine"
        assert legs[1].pop(b"x-baton-leg") not in (b"mine", b"theirs")
        assert (
            legs
            == [
                {
                    b"content-type": b"application/json",
                    b"accept-encoding": b"identity",
                    b"accept": b"*/*",
                    b"traceparent": TRACE,
                    b"authorization": b"Bearer ours",
                }
            ]
            * 2
        )

    run(test, credential="ours")


@pytest.mark.parametrize("given", [b"", b"a b", b'"\xff:;', b"x" * 20_000])
def test_the_worker_that_answers_is_told_what_the_client_calls_its_request(given: bytes) -> None:
    async def test(cluster: FakeCluster) -> None:
        for document in (CHAT, CHAT | {"request_id": "theirs"}, CHAT | {"n": 0}):
            await cluster.ask(document, headers=[(b"x-request-id", given)])
            assert dict(cluster.upstream.requests[-1].headers)[b"x-request-id"] == given
        assert len(set(map(leg_name, cluster.upstream.requests))) == 5

    run(test)


def test_a_body_that_names_its_request_is_believed() -> None:
    async def test(cluster: FakeCluster) -> None:
        await cluster.ask(CHAT | {"request_id": "theirs"})
        prefill, decode = cluster.upstream.requests
        assert b"x-request-id" not in dict(decode.headers)
        assert b"x-baton-leg" in dict(decode.headers)
        assert b"x-request-id" in dict(prefill.headers)
        assert [read(leg).get("request_id") for leg in (prefill, decode)] == [None, "theirs"]

    run(test)


_OF_CLIENTS = [(name, TRACE if name == b"traceparent" else b"7") for name in TO_WORKERS]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_workers_get_what_they_read_of_a_clients_head(*, is_allowed: bool) -> None:
    sent = [*_OF_CLIENTS, (b"x-data-parallel-rank", b"1"), (b"x-session", b"8"), (b"x-request-timeout", b"9")]

    async def test(cluster: FakeCluster) -> None:
        cluster.plane.relayed = relayed_to_workers(has_rank=is_allowed)
        await cluster.ask(CHAT, headers=sent)
        expected = _OF_CLIENTS + [(b"x-data-parallel-rank", b"1")] * is_allowed
        for leg in cluster.upstream.requests:
            ours = (b"content-type", b"accept-encoding", b"x-request-id")
            assert [field for field in leg.headers if field[0] not in ours] == expected

    run(test)


def test_a_client_that_asks_for_the_load_gets_the_decode_workers() -> None:
    load = b"TEXT named_metrics.kv_cache_utilization=0.5"

    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(CHAT)
        assert b"endpoint-load-metrics" not in answer.answer_headers
        told = JSON | {b"endpoint-load-metrics": load, b"set-cookie": b"a=1"}
        cluster.upstream.serve(
            cluster.origin("decode/0"), answering(200, b'{"choices":[{"finish_reason":"stop"}]}', told)
        )
        answer = await cluster.ask(CHAT, headers=[(b"endpoint-load-metrics-format", b"TEXT")])
        assert answer.answer_headers[b"endpoint-load-metrics"] == load
        assert b"set-cookie" not in answer.answer_headers
        cluster.workers.pinned.clear()

    run(test)


# --- one leg ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v1/completions", {"model": "m", "prompt": ["a", "b"]}),
        ("/v1/completions", {"model": "m", "prompt": "a", "echo": True}),
        ("/v1/chat/completions", CHAT | {"prompt_logprobs": 1}),
        ("/tokenize", {"model": "m", "prompt": "a"}),
    ],
)
def test_what_cannot_be_handed_over_goes_to_one_worker(path: str, document: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(document | {"kv_transfer_params": {"remote_host": "evil"}}, path=path)
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"
        assert answer.answer_headers[b"x-baton-kv"] == b"local"
        assert cluster.legs("prefill") == []
        assert [(leg.target, read(leg)) for leg in cluster.legs("decode")] == [(path, document)]

    run(test)


def test_disaggregation_can_be_turned_off() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(STREAM)
        assert answer.sent == token("a") + token("b") + token("c") + LAST
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"

    cluster = run(test, routing=RoutingConfig(disaggregate="never"))
    assert cluster.telemetry.records[0].kv is Kv.LOCAL


# --- transport ----------------------------------------------------------------------------------


def announce(cluster: FakeCluster, *encodings: Encoding) -> None:
    for worker in cluster.registry.workers:
        info = WorkerInfo(
            role="both", model="m", decodes=["json", *encodings], engine="sim", engine_version="0"
        )
        cluster.registry.announce(worker, Introduction(info, None))


def sent_as(cluster: FakeCluster) -> list[str]:
    return ["msgpack" if b"x-msgpack" in dict(leg.headers) else "json" for leg in cluster.upstream.requests]


def test_msgpack_goes_to_workers_that_announce_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        announce(cluster, "msgpack")
        assert (await cluster.ask(CHAT)).status == 200
        assert sent_as(cluster) == ["msgpack", "msgpack"]
        assert dict(cluster.upstream.requests[0].headers)[b"content-type"] == b"application/json"
        assert read(cluster.legs("prefill")[0])["messages"] == CHAT["messages"]

    run(test, transport="msgpack")


def test_json_goes_to_all_others() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT)).status == 200
        assert sent_as(cluster) == ["json", "json"]

    run(test, transport="msgpack")


LARGE = {"user": "x" * 1_100_000}


@pytest.mark.processes
def test_a_large_body_becomes_msgpack_elsewhere() -> None:
    async def test(cluster: FakeCluster) -> None:
        announce(cluster, "msgpack")
        assert (await cluster.ask(CHAT | LARGE)).status == 200
        assert sent_as(cluster) == ["msgpack", "msgpack"]
        assert read(cluster.legs("decode")[0])["user"] == LARGE["user"]
        assert not any(cluster.telemetry.row[cluster.telemetry.layout.fallbacks :][: len(FallbackReason)])

    run(test, transport="msgpack")


@pytest.mark.processes
@pytest.mark.parametrize("field", [{"seed": 2**70}, {"seed": 2**70, **LARGE}])
def test_what_msgpack_cannot_carry_goes_as_json_and_is_counted(field: Any) -> None:
    reason = FallbackReason.NOT_ENCODABLE

    async def test(cluster: FakeCluster) -> None:
        announce(cluster, "msgpack")
        assert (await cluster.ask(CHAT | field)).status == 200
        assert sent_as(cluster) == ["json", "json"]
        key, value = next(iter(field.items()))
        assert read(cluster.legs("decode")[0])[key] == value
        assert cluster.telemetry.row[cluster.telemetry.layout.fallbacks + reason] == 2

    run(test, transport="msgpack")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"{", 400, "invalid_request"),
        (b'{"model":"m","model":"m"}', 400, "invalid_request"),
        (b'{"model":"m","stream":[]}', 400, "invalid_request"),
        (b'{"model":"x"}', 404, "model_not_found"),
    ],
)
def test_a_bad_request_reaches_no_worker(body: bytes, status: int, code: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask(body)
        assert answer.status == status
        assert json.loads(answer.sent)["error"]["code"] == code
        assert cluster.upstream.requests == []

    assert run(test).telemetry.records[0].error_code == code


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [], "stream": True}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_a_request_without_a_model_gets_the_only_one(
    path: str, fields: dict[str, Any], model: dict[str, Any]
) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(fields | model, path=path)).status == 200
        assert {read(leg)["model"] for leg in cluster.upstream.requests} == {"m"}

    run(test)


def test_a_request_without_a_model_is_told_of_several() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.flow._routes = {**cluster.flow._routes, "other": cluster.flow._routes["m"]}  # type: ignore[dict-item]
        answer = await cluster.ask({"messages": []})
        error = json.loads(answer.sent)["error"]
        assert (answer.status, error["param"]) == (400, "model")
        assert error["message"] == "the field 'model' is required; there is: m, other"

    run(test)


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/completions/", "/tokenize/"])
def test_a_slash_behind_the_path_changes_nothing(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask({**CHAT, "prompt": "a"}, path=path)).status == 200
        assert {leg.target for leg in cluster.upstream.requests} == {path.rstrip("/")}
        assert cluster.telemetry.records[0].endpoint == path.rstrip("/")

    run(test)


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    async def test(cluster: FakeCluster) -> None:
        error = json.loads((await cluster.ask({"model": "nope"})).sent)["error"]
        assert error["message"] == "the model 'nope' does not exist; there is: m"
        assert error["param"] == "model"

    run(test)


def test_only_post_is_served() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT, method="GET")).status == 405

    run(test)


def test_no_worker_is_a_503_at_once() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.registry.judge.mark_gone(cluster.worker("decode/0"), "test")
        answer = await cluster.ask(CHAT)
        assert answer.status == 503
        assert answer.answer_headers[b"retry-after"] == b"1"
        assert cluster.upstream.requests == []

    run(test)


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
def test_a_workers_own_error_reaches_the_client_unchanged(status: int) -> None:
    async def test(cluster: FakeCluster) -> None:
        headers = JSON | {b"retry-after": b"7"}
        cluster.upstream.serve(cluster.origin("prefill/0"), answering(status, REFUSAL, headers))
        answer = await cluster.ask(CHAT)
        assert (answer.status, answer.sent) == (status, REFUSAL)
        assert answer.answer_headers[b"retry-after"] == b"7"
        assert cluster.legs("decode") == []

    run(test)


def test_decode_is_never_sent_after_a_prefill_without_handoff() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("prefill/0"), answering(200, b'{"choices":[]}'))
        answer = await cluster.ask(STREAM)
        assert answer.status == 502
        assert json.loads(answer.sent)["error"]["code"] == "worker_garbage"
        assert cluster.legs("decode") == []

    run(test)


@pytest.mark.parametrize("document", [CHAT, STREAM])
def test_blocks_are_released_when_decode_refuses(document: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        refusals = 0

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            nonlocal refusals
            if read(request)["max_tokens"] == 1:
                await cluster.workers.decode(request, reply)
            else:
                refusals += 1
                reply.answer(400, REFUSAL, JSON)

        cluster.upstream.serve(cluster.origin("decode/0"), decode)
        answer = await cluster.ask(document)
        assert (answer.status, answer.sent, refusals) == (400, REFUSAL, 1)
        await cluster.flow.aclose()
        _, release = cluster.legs("decode")
        assert read(release)["kv_transfer_params"]["remote_request_id"] == "r0"

    run(test)


def test_a_hand_off_of_which_nothing_was_sent_goes_to_another_decode_worker() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("decode/0"))
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert cluster.worker("decode/0").state == "gone"
        assert len(cluster.legs("prefill")) == 1
        (decode,) = cluster.legs("decode")
        assert decode.origin == cluster.origin("decode/1")

    run(test, roles=("prefill", "decode", "decode"))


# --- broken answers -----------------------------------------------------------------------------


def stream_of(*chunks: bytes, cut: bool = False) -> Callable[[MemoryRequest, MemoryReply], Awaitable[None]]:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, SSE)
        for chunk in chunks:
            await reply.chunk(chunk)
        if cut:
            reply.cut_short()

    return worker


def free(cluster: FakeCluster) -> None:
    """The scripted decode workers of these tests pull nothing."""
    cluster.workers.pinned.clear()


def test_an_error_before_the_first_token_is_an_error_answer() -> None:
    async def test(cluster: FakeCluster) -> None:
        failed = event({"error": {"message": "KV load failed", "code": 500}})
        role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        cluster.upstream.serve(cluster.origin("decode/0"), stream_of(role, failed, DONE))
        answer = await cluster.ask(STREAM)
        assert answer.status == 500
        assert json.loads(answer.sent)["error"]["message"] == "KV load failed"
        free(cluster)

    run(test)


@pytest.mark.parametrize(
    ("chunks", "cut"),
    [
        ([token("a"), b'data: {"cho'], True),
        ([token("a"), token("b")], True),
        ([token("a"), token("b")], False),
        ([token("a"), b'data: {"cho'], False),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error_event(chunks: list[bytes], cut: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), stream_of(*chunks, cut=cut))
        answer = await cluster.ask(STREAM)
        assert answer.status == 200
        *events, failed, done, end = answer.sent.split(b"\n\n")
        assert b"\n\n".join(events) + b"\n\n" == b"".join(
            chunk for chunk in chunks if chunk.endswith(b"\n\n")
        )
        assert json.loads(failed.removeprefix(b"data: "))["error"]["code"] == "worker_cut_short"
        assert (done, end) == (b"data: [DONE]", b"")
        free(cluster)

    assert run(test).telemetry.records[0].error_code == "worker_cut_short"


@pytest.mark.parametrize("chunks", [[], [b"data: {"]])
@pytest.mark.parametrize("cut", [True, False])
def test_a_stream_without_any_event_is_a_502(chunks: list[bytes], cut: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), stream_of(*chunks, cut=cut))
        assert (await cluster.ask(STREAM)).status == 502
        free(cluster)

    run(test)


def test_a_buffered_answer_that_breaks_is_a_502() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), stream_of(b'{"choices":', cut=True))
        assert (await cluster.ask(CHAT)).status == 502
        free(cluster)

    run(test)


# --- clients that leave -------------------------------------------------------------------------


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("document", [CHAT, STREAM])
@pytest.mark.parametrize("step", [1, 5])
def test_a_client_may_leave_at_any_moment(document: Any, step: int) -> None:
    """Whatever runs is stopped and whatever was pinned is freed, at every turn of the event loop."""

    async def leave_after(cluster: FakeCluster, count: int) -> bool:
        cluster.workers.step = step
        exchange = FakeExchange(json.dumps(document).encode())
        serving = asyncio.create_task(cluster.serve(exchange))
        await turns(count)
        exchange.leave()
        await serving
        assert exchange.is_complete or exchange.is_aborted
        return exchange.is_complete

    count, is_complete = 0, False
    while not is_complete:
        seen: list[bool] = []

        async def test(cluster: FakeCluster, count: int = count, seen: list[bool] = seen) -> None:
            seen.append(await leave_after(cluster, count))
            await cluster.flow.aclose()
            assert cluster.workers.pinned == set()

        cluster = run(test)
        (is_complete,) = seen
        (record,) = cluster.telemetry.records
        assert (record.error_code is None) == is_complete
        count += 1
    assert count > 6  # it did leave in the middle


def test_a_client_that_leaves_during_prefill_stops_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        is_running, is_stopped = asyncio.Event(), asyncio.Event()

        async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
            is_running.set()
            try:
                await reply.hang()
            finally:
                is_stopped.set()

        cluster.upstream.serve(cluster.origin("prefill/0"), prefill)
        exchange = FakeExchange(json.dumps(CHAT).encode())
        serving = asyncio.create_task(cluster.serve(exchange))
        await is_running.wait()
        exchange.leave()
        await serving
        await is_stopped.wait()
        assert cluster.legs("decode") == []

    assert run(test).telemetry.records[0].status == 499
