from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.api.holders import response_id
from orchestrator.config.options import RoutingConfig
from orchestrator.control.state import RouteAnswer, RouteQuestion
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import C, Choice, Context, Explanation, Policy, PolicySpec, Request
from tests.orchestrator.fakes import FakeCluster

CHAT = {"model": "m", "messages": [{"role": "user", "content": "What is prefill? " * 200}]}
PROCESS = {"index": 2, "pid": 71}
JSON = (b"content-type", b"application/json")


def run(test: Callable[[FakeCluster], Awaitable[None]], **options: Any) -> FakeCluster:
    async def main() -> FakeCluster:
        options.setdefault("roles", ("prefill", "prefill", "decode", "decode"))
        cluster = FakeCluster(**options)
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


def ask(
    cluster: FakeCluster,
    document: Any = CHAT,
    *,
    path: str = "/v1/chat/completions",
    avoid: tuple[str, ...] = (),
    headers: Any = (),
) -> RouteAnswer:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return cluster.core.explain(RouteQuestion(path, [JSON, *headers], body, avoid), PROCESS)


def told(cluster: FakeCluster, *args: Any, **options: Any) -> Any:
    answer = ask(cluster, *args, **options)
    assert answer.status == 200, answer.content
    return json.loads(answer.content)


def refused(cluster: FakeCluster, *args: Any, **options: Any) -> tuple[int, str]:
    answer = ask(cluster, *args, **options)
    error = json.loads(answer.content)["error"]
    return answer.status, error["message"]


def test_what_headers_choose_is_told() -> None:
    async def test(cluster: FakeCluster) -> None:
        whole = told(cluster, headers=[(b"x-baton-disaggregate", b"never")])
        assert (whole["plan"]["path"], whole["plan"]["prefill"]) == ("aggregated", None)
        for name in ("m/decode/0", "m/decode/1"):
            chosen = told(cluster, headers=[(b"x-baton-worker-decode", name.encode())])
            assert chosen["plan"]["decode"] == name
        status, message = refused(cluster, headers=[(b"x-baton-disaggregate", b"sometimes")])
        assert (status, "allowed: always, auto" in message) == (400, True)
        status, message = refused(cluster, headers=[(b"x-baton-policy-decode", b"random")])
        assert (status, "is not allowed here" in message) == (400, True)

    overrides = ["x-baton-disaggregate", "x-baton-worker-decode"]
    run(test, routing=RoutingConfig.model_validate({"overrides": overrides}))


@pytest.mark.parametrize("decode", [*POLICIES])
@pytest.mark.parametrize("prefill", [*POLICIES])
def test_what_is_told_is_what_happens(prefill: str, decode: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(3):
            document = told(cluster)
            exchange = await cluster.ask(CHAT)
            assert exchange.status == 200
            (record,) = cluster.telemetry.records
            cluster.telemetry.records.clear()
            assert document["plan"]["prefill"] == record.prefill_worker
            assert document["plan"]["decode"] == record.decode_worker
            assert record.reasons is not None
            assert document["prefill"]["reason"] == str(record.reasons.prefill_choice)
            assert document["decode"]["reason"] == str(record.reasons.decode_choice)

    run(test, routing=RoutingConfig.model_validate({"prefill": prefill, "decode": decode}))


def test_nothing_is_sent_or_counted() -> None:
    async def test(cluster: FakeCluster) -> None:
        before = [*cluster.telemetry.row]
        document = told(cluster)
        assert document["process"] == PROCESS
        assert (document["model"], document["path"]) == ("m", "/v1/chat/completions")
        assert document["prompt_tokens"] > 800
        assert document["admission"]["waits"] is False
        assert [*cluster.telemetry.row] == before
        assert cluster.upstream.requests == []
        assert not cluster.plane.open

    run(test)


def test_a_request_that_would_wait_is_told_so() -> None:
    async def test(cluster: FakeCluster) -> None:
        gate = cluster.admission.gates["m"]
        gate.free -= 2
        admission = told(cluster)["admission"]
        assert admission == {
            "seats": 2,
            "free": 0,
            "waiting": 0,
            "waits": True,
            "why": "no seat is free, and 0 wait",
        }
        gate.free += 2

    run(test, seats=1)


@pytest.mark.parametrize(
    ("document", "path", "reason"),
    [
        ({**CHAT, "max_tokens": 0}, "/v1/chat/completions", "no token asked for"),
        ({"model": "m", "prompt": "x", "echo": True}, "/v1/completions", "echo"),
        ({"model": "m", "input": "x"}, "/v1/embeddings", "this endpoint needs one worker"),
        ({**CHAT, "max_tokens": -1}, "/v1/chat/completions", "its decode worker is likely to refuse it"),
    ],
)
def test_why_one_worker_serves_it(document: Any, path: str, reason: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        plan = told(cluster, document, path=path)["plan"]
        assert (plan["path"], plan["prefill"], plan["whole_reason"]) == ("aggregated", None, reason)

    run(test)


def test_workers_that_have_failed_it_are_avoided() -> None:
    async def test(cluster: FakeCluster) -> None:
        document = told(cluster, avoid=("m/prefill/0", "m/decode/1"))
        assert document["plan"]["prefill"] == "m/prefill/1"
        assert document["plan"]["decode"] == "m/decode/0"
        assert document["rejected"] == [
            {"worker": "m/prefill/0", "why": "it is to be avoided"},
            {"worker": "m/decode/1", "why": "it is to be avoided"},
        ]
        assert refused(cluster, avoid=("m/decode/9",))[0] == 400

    run(test)


def test_headers_count_as_the_clients() -> None:
    async def test(cluster: FakeCluster) -> None:
        reasons = {
            told(cluster, headers=headers)["decode"]["reason"] for headers in ((), [(b"x-session-id", b"a")])
        }
        assert len(reasons) == 2

    run(test, routing=RoutingConfig.model_validate({"decode": "session"}))


def test_what_only_one_worker_has_is_there() -> None:
    async def test(cluster: FakeCluster) -> None:
        document = {"model": "m", "input": "x", "previous_response_id": response_id("m/decode/1")}
        made = told(cluster, document, path="/v1/responses")
        assert made["plan"]["decode"] == "m/decode/1"
        name = document["previous_response_id"]
        assert told(cluster, b"", path=f"/v1/responses/{name}")["plan"]["decode"] == "m/decode/1"
        assert refused(cluster, b"", path="/v1/responses/resp_none")[0] == 404

    run(test)


HOSTILE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b"\xff\xfe",
    b'{"model":1}',
    b'{"model":"m","model":"m"}',
    b'{"model":"m","stream":"maybe"}',
    b'{"model":"m","max_tokens":{}}',
    b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model":"m","messages":' + b"[" * 100_000,
    b'{"model":"m","stream_options":7}',
    b'{"model":"m"}trailing',
    b"\x00" * 1000,
]


@pytest.mark.parametrize(
    "routing", [{}, {"prefill": "prefix", "disaggregate": "auto"}], ids=["default", "auto"]
)
@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:30]))
def test_hostile_bodies_are_the_clients_mistake(body: bytes, routing: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        status, message = refused(cluster, body)
        assert status == 400
        assert message

    run(test, routing=RoutingConfig.model_validate(routing))


@pytest.mark.parametrize("path", [*ENDPOINTS])
@pytest.mark.parametrize("body", [*HOSTILE[:6], json.dumps(CHAT).encode()], ids=lambda body: repr(body[:30]))
def test_no_endpoint_fails_of_a_body(path: str, body: bytes) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert ask(cluster, body, path=path).status in (200, 400, 404)

    run(test)


@pytest.mark.parametrize("path", ["", "/", "/v1/chat", "/admin/explain", "no path", "/v1/\udcff"])
def test_a_path_that_nobody_serves(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        status, message = refused(cluster, path=path)
        assert status == 400
        assert "/v1/chat/completions" in message

    run(test)


def test_an_unknown_model_is_what_the_client_would_hear() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert refused(cluster, {**CHAT, "model": "other"})[0] == 404

    run(test)


def test_nobody_can_serve_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        document = told(cluster)
        assert document["plan"] is None
        assert document["refused"] == "no decode worker is ready for the model 'm'"

    run(test, roles=("prefill",))


class Broken(Policy):
    """It cannot explain itself."""

    def __init__(self, context: Context) -> None:
        pass

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        return Choice(candidates[0], "It is the first.")

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        raise ZeroDivisionError


def test_a_policy_that_fails_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(POLICIES, "broken", PolicySpec("broken", Broken, "It is broken."))

    async def test(cluster: FakeCluster) -> None:
        assert ask(cluster).status == 500
        assert (await cluster.ask(CHAT)).status == 200

    run(test, routing=RoutingConfig.model_validate({"prefill": "broken"}))
    assert "cannot be told" in caplog.text
