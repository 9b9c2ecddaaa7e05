"""Streams whose worker is lost in the middle: the client sees one stream, or an error, never a short one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.legs.retry import BUDGET_LEAST
from orchestrator.telemetry.counters import RetryReason
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import Role
from tests.orchestrator.fakes import DONE, JSON, SSE, FakeCluster, FakeExchange, event, read
from tests.orchestrator.wire import sim_worker

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "tell me something"}],
    "max_tokens": 12,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
COMPLETION: dict[str, Any] = {
    "model": "m",
    "prompt": "tell me something",
    "max_tokens": 12,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
BOTH_APIS = pytest.mark.parametrize("document", [CHAT, COMPLETION], ids=["chat", "completion"])
FOUR = ("prefill", "prefill", "decode", "decode", "decode")

Test = Callable[["Cluster"], Awaitable[None]]


class Cluster(FakeCluster):
    """Decode workers answer as the simulated engine; `cuts` says after how many events legs are lost."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"roles": FOUR, **options})
        self.cuts: list[int] = []
        self.instead: bytes = b""  # what a worker says instead of going on
        self.firsts: list[bytes] = []  # the same for the first ones
        self.tokenizes = True
        self.refusal = 500  # of a worker that does not tokenize
        for worker in self.registry.workers:
            self.upstream.serve(worker.origin, self._answer)

    async def _answer(self, request: MemoryRequest, reply: MemoryReply) -> None:
        name = next(w.name for w in self.registry.workers if w.origin == request.origin)
        if request.target == "/tokenize":
            body = json.dumps(json.loads(request.body) | {"model": "tiny"}).encode()
            reply.answer(200 if self.tokenizes else self.refusal, sim_worker.tokenize(body), JSON)
        elif "prefill" in name:
            await self.workers.prefill(request, reply)
        else:
            await self._stream(request, reply, self.cuts.pop(0) if self.cuts else None)

    async def _stream(self, request: MemoryRequest, reply: MemoryReply, cut: int | None) -> None:
        document = read(request)
        params = document.get("kv_transfer_params") or {}
        self.workers.pinned.discard(params.get("remote_request_id"))
        reply.head(200, SSE)
        name = dict(request.headers)[b"x-request-id"].decode()
        for index, piece in enumerate(pieces_of(document, name)):
            if index == cut:
                await self._fail(reply)
                return
            await reply.chunk(piece)

    async def _fail(self, reply: MemoryReply) -> None:
        instead = self.firsts.pop(0) if self.firsts else self.instead
        if instead:
            await reply.chunk(instead)
        else:
            reply.cut_short()

    async def stream(self, document: dict[str, Any]) -> FakeExchange:
        path = next(path for field, path in PATHS.items() if field in document)
        return await self.ask(document, path=path)


def run(test: Test, **options: Any) -> Cluster:
    async def main() -> Cluster:
        cluster = Cluster(**options)
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


def pieces_of(document: dict[str, Any], name: str = "") -> list[bytes]:
    return sim_worker.stream(document | {"model": "tiny"}, name)


def uncut(document: dict[str, Any]) -> bytes:
    """The client's stream if nothing happens."""
    streams: list[bytes] = []

    async def test(cluster: Cluster) -> None:
        streams.append((await cluster.stream(document)).sent)

    run(test)
    return streams[0]


def events_of(stream: bytes) -> list[dict[str, Any]]:
    assert stream.endswith(DONE)
    return [json.loads(part[6:]) for part in stream.removesuffix(DONE).split(b"\n\n") if part]


def told(stream: bytes) -> dict[str, Any]:
    """What a client makes of a stream: one id, text, reasons to finish, roles, usage."""
    events = events_of(stream)
    choices = [choice for each in events for choice in each["choices"]]
    deltas = [choice.get("delta", choice) for choice in choices]
    return {
        "ids": len({each["id"] for each in events}),
        "text": "".join(delta.get("content", delta.get("text")) or "" for delta in deltas),
        "finish": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "roles": [delta["role"] for delta in deltas if delta.get("role")],
        "usage": [each["usage"]["completion_tokens"] for each in events if each.get("usage")],
    }


# --- one stream ---------------------------------------------------------------------------------


@BOTH_APIS
@pytest.mark.parametrize("asks_usage", [False, True], ids=["", "usage"])
@pytest.mark.parametrize("cut", [2, 3, 7, 11, 12, 13])
def test_a_stream_that_is_cut_goes_on(document: dict[str, Any], asks_usage: bool, cut: int) -> None:
    if asks_usage:
        document = document | {"stream_options": {"include_usage": True}}
    expected = told(uncut(document))

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [cut]
        assert told((await cluster.stream(document)).sent) == expected

    cluster = run(test)
    assert cluster.telemetry.records[-1].status == 200
    assert cluster.telemetry.records[-1].error_code is None


@BOTH_APIS
def test_a_stream_that_its_client_names_is_called_so_to_its_end(document: dict[str, Any]) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5]
        path = next(path for field, path in PATHS.items() if field in document)
        answer = await cluster.ask(document, path=path, headers=[(b"x-request-id", b"mine")])
        prefix = "chatcmpl" if "messages" in document else "cmpl"
        assert {each["id"] for each in events_of(answer.sent)} == {f"{prefix}-mine"}

    run(test)


@BOTH_APIS
def test_it_may_be_cut_again(document: dict[str, Any]) -> None:
    expected = told(uncut(document))

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5, 4]
        cluster.firsts = [b"", event({"error": {"message": "no", "type": "x", "code": 500}}) + DONE]
        assert told((await cluster.stream(document)).sent) == expected
        assert len({leg.origin for leg in cluster.legs("decode") if leg.target != "/tokenize"}) == 3

    cluster = run(test)
    retries = cluster.telemetry.row[cluster.telemetry.layout.retries + RetryReason.STREAM]
    assert retries == 2


@BOTH_APIS
def test_a_stream_that_has_lost_two_workers_ends(document: dict[str, Any]) -> None:
    """The third one could go on with it, and is not asked."""

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5, 4]
        answer = await cluster.stream(document)
        assert events_of(answer.sent)[-1]["error"]["code"] == "poison"
        assert len({leg.origin for leg in cluster.legs("decode") if leg.target != "/tokenize"}) == 2

    cluster = run(test)
    assert cluster.telemetry.records[-1].error_code == "poison"
    assert cluster.telemetry.row[cluster.telemetry.layout.poison] == 1


def test_each_attempt_has_a_hand_off_of_its_own() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5]
        await cluster.stream(CHAT)
        legs = [read(leg) for leg in cluster.legs("decode") if leg.target != "/tokenize"]
        assert len({leg["kv_transfer_params"]["remote_request_id"] for leg in legs}) == len(legs) == 2

    run(test)


def test_a_stream_that_only_lacks_its_end_gets_it_without_another_leg() -> None:
    pieces = len(pieces_of(CHAT | {"stream_options": {"include_usage": True}}))

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [pieces - 1]
        assert told((await cluster.stream(CHAT)).sent) == told(expected)
        assert len([leg for leg in cluster.legs("decode") if leg.target != "/tokenize"]) == 1

    expected = uncut(CHAT)
    run(test)


def test_a_worker_that_falls_silent_is_replaced_once_its_probe_fails_too() -> None:
    async def test(cluster: Cluster) -> None:
        worker, hangs = cluster.worker("decode/0"), asyncio.Event()

        async def falls_silent(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            for piece in pieces_of(read(request))[:4]:
                await reply.chunk(piece)
            cluster.workers.pinned.discard(read(request)["kv_transfer_params"]["remote_request_id"])
            hangs.set()
            await reply.hang()

        cluster.upstream.serve(worker.origin, falls_silent)
        asked = asyncio.create_task(cluster.stream(CHAT))
        await hangs.wait()
        (scope,) = cluster.plane.open
        now = asyncio.get_running_loop().time()
        scope.sweep(now)  # sees what has come
        scope.sweep(now + 60)
        assert not asked.done()
        cluster.registry.judge.mark_gone(worker, "no answer")
        scope.sweep(now + 61)
        assert told((await asked).sent) == expected

    expected = told(uncut(CHAT))
    run(test)


# --- streams that cannot go on ------------------------------------------------------------------


def error_of(answer: FakeExchange) -> str:
    """The error that a stream ends with."""
    events = events_of(answer.sent)
    assert [each for each in events if "error" in each] == events[-1:]
    message: str = events[-1]["error"]["message"]
    return message


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"n": 2, "temperature": 1}, "'n'"),
        ({"logprobs": True}, "'logprobs'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "'tools'"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
    ],
    ids=["n", "logprobs", "tools", "json"],
)
def test_what_cannot_go_on_ends_with_an_error(field: dict[str, Any], reason: str) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [6]
        assert reason in error_of(await cluster.stream(CHAT | field))

    assert run(test).telemetry.records[-1].error_code == "worker_cut_short"


def test_without_token_ids_nobody_can_go_on() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts, cluster.tokenizes = [4], False
        assert "token ids" in error_of(await cluster.stream(CHAT))

    run(test)


def test_workers_that_deny_to_tell_token_ids_are_looked_at() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts, cluster.tokenizes, cluster.refusal = [4], False, 401
        assert "token ids" in error_of(await cluster.stream(CHAT))
        asked = {leg.origin for leg in cluster.upstream.requests if leg.target == "/tokenize"}
        assert asked
        assert {worker.origin for worker in cluster.registry.workers if worker.is_denied} == asked

    run(test)


def test_it_can_be_turned_off() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [4]
        error_of(await cluster.stream(CHAT))

    run(test, max_kept_bytes=0)


def test_a_stream_never_ends_short_and_clean_when_all_workers_are_lost() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5, 1, 1, 1, 1]
        error_of(await cluster.stream(CHAT))

    run(test)


def test_a_client_that_leaves_while_another_worker_takes_over_leaves_nothing_behind() -> None:
    async def leave_after(turns: int) -> None:
        cluster = Cluster()
        cluster.cuts = [5]
        exchange = FakeExchange(json.dumps(CHAT).encode())
        asked = asyncio.create_task(cluster.serve(exchange))
        for _ in range(turns):
            await asyncio.sleep(0)
        exchange.leave()
        await asked
        await cluster.aclose()
        cluster.assert_at_rest()

    for turns in range(1, 60):
        asyncio.run(leave_after(turns))


@pytest.mark.parametrize("code", [500, 503])
def test_an_error_in_the_middle_of_a_stream_is_a_loss(code: int) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5]
        cluster.instead = event({"error": {"message": "engine died", "type": "x", "code": code}}) + DONE
        assert told((await cluster.stream(CHAT)).sent) == expected

    expected = told(uncut(CHAT))
    run(test)


@BOTH_APIS
def test_a_stream_that_the_worker_ends_by_itself_goes_on(document: dict[str, Any]) -> None:
    """As vLLM may end all of its streams when SIGTERM stops it."""
    expected = told(uncut(document))

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5]
        cluster.instead = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}) + DONE
        assert told((await cluster.stream(document)).sent) == expected

    run(test)


def test_all_streams_of_an_engine_that_is_stopped_go_on() -> None:
    """More of them than the budget for replacements after answers has room for."""
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5] * streams
        error = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
        cluster.instead = event({"error": error}) + DONE
        answers = await asyncio.gather(*(cluster.stream(CHAT) for _ in range(streams)))
        assert [told(answer.sent) for answer in answers] == [expected] * streams

    streams = 4 * BUDGET_LEAST
    expected = told(uncut(CHAT))
    run(test)


def test_streams_of_the_only_decode_worker_go_on_at_one_that_does_both() -> None:
    """At once: a second replacement of each would be more than the budget has room for."""

    async def test(cluster: Cluster) -> None:
        cluster.cuts = [5] * streams
        answers = await asyncio.gather(*(cluster.stream(CHAT) for _ in range(streams)))
        assert [told(answer.sent) for answer in answers] == [expected] * streams
        assert len(cluster.legs("decode")) == streams

    streams = 4 * BUDGET_LEAST
    expected = told(uncut(CHAT))
    run(test, roles=("prefill", "decode", "both"))


@pytest.mark.parametrize("disaggregate", ["always", "strict"])
def test_the_rest_of_a_stream_is_of_the_same_revision_as_its_beginning(disaggregate: str) -> None:
    """Unless nobody of it is left."""

    async def test(cluster: Cluster) -> None:
        decodes = [worker for worker in cluster.registry.workers if worker.address.role == "decode"]
        for worker in cluster.registry.workers:
            worker.revision = "new" if worker.name in ("m/prefill/2", "m/decode/4") else "old"
        alone = decodes[4]
        for _ in range(8):
            cluster.cuts = [4]
            for worker in decodes:  # one that has lost a leg is suspect
                cluster.registry.judge.mark_ready(worker)
            before = len(cluster.upstream.requests)
            assert (await cluster.stream(CHAT)).sent.endswith(DONE)
            asked = [request.origin for request in cluster.upstream.requests[before:]]
            first, *_, last = (worker for origin in asked for worker in decodes if worker.origin == origin)
            assert first is not last
            assert (first.revision == last.revision) is (first is not alone)

    roles: tuple[Role, ...] = ("prefill",) * 3 + ("decode",) * 5
    run(test, roles=roles, routing=RoutingConfig.model_validate({"disaggregate": disaggregate}))
