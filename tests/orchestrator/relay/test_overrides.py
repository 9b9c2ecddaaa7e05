"""Headers of a client that choose otherwise than the config, where it allows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.overrides import NAMES
from tests.orchestrator.fakes import FakeCluster, FakeExchange

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ROLES = ("prefill", "decode", "prefill", "decode")
Test = Callable[[FakeCluster], Awaitable[None]]


def run(test: Test, *, roles: Any = ROLES, overrides: Any = NAMES, **routing: Any) -> FakeCluster:
    async def main() -> FakeCluster:
        section = RoutingConfig.model_validate({"overrides": [*overrides], **routing})
        cluster = FakeCluster(roles=roles, routing=section)
        await asyncio.wait_for(test(cluster), 60)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


async def ask(cluster: FakeCluster, document: Any = CHAT, path: str = "", **headers: str) -> FakeExchange:
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    options = {"path": path} if path else {}
    exchange = FakeExchange(json.dumps(document).encode(), headers=fields, **options)
    return await cluster.serve(exchange)


def message(exchange: FakeExchange) -> str:
    text: str = json.loads(exchange.sent)["error"]["message"]
    return text


def workers_of(cluster: FakeCluster) -> list[tuple[str | None, str | None]]:
    return [(record.prefill_worker, record.decode_worker) for record in cluster.telemetry.records]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/tokenize"])
def test_what_is_not_allowed_is_refused_and_nothing_sent(name: str, path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await ask(cluster, {**CHAT, "input": "a"}, path, **{name: "always"})
        assert answer.status == 400
        assert message(answer) == f"the header {name} is not allowed here; allowed: {allowed}"

    for overrides in ([], [other for other in NAMES if other != name][:1]):
        allowed = ", ".join(overrides) or "none"
        assert run(test, overrides=overrides).upstream.requests == []


@pytest.mark.parametrize(
    ("header", "value", "allowed"),
    [
        ("x-baton-policy-prefill", "best", "kv_events, least_loaded, least_tokens, power_of_two, prefix, "),
        ("x-baton-policy-decode", "", "kv_events, least_loaded, "),
        ("x-baton-disaggregate", "Always", "always, auto, strict, never"),
        ("x-baton-worker-prefill", "m/decode/0", "m/prefill/0, m/prefill/1"),
        ("x-baton-worker-decode", "decode/0", "m/decode/0, m/decode/1"),
        ("x-baton-worker-decode", "x" * 5000, "m/decode/0, m/decode/1"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(header: str, value: str, allowed: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await ask(cluster, **{header: value})
        assert answer.status == 400
        assert message(answer).startswith(f"{header}: {value[:100]!r} is not possible; allowed: {allowed}")

    assert run(test).upstream.requests == []


def test_what_is_given_twice_is_refused() -> None:
    async def test(cluster: FakeCluster) -> None:
        fields = [(b"x-baton-disaggregate", b"never"), (b"x-baton-disaggregate", b"always")]
        answer = await cluster.serve(FakeExchange(json.dumps(CHAT).encode(), headers=fields))
        assert answer.status == 400
        assert "given twice" in message(answer)

    run(test)


def test_workers_hear_nothing_of_it_and_all_else_of_the_client() -> None:
    async def test(cluster: FakeCluster) -> None:
        first = {"x-baton-disaggregate": "always", "accept": "x-baton-", "x-session-id": "7"}
        assert (await ask(cluster, **first)).status == 200
        assert (await ask(cluster, accept="x-baton-disaggregate: 1")).status == 200
        for request in cluster.upstream.requests[:2]:
            headers = dict(request.headers)
            assert (headers[b"accept"], headers[b"x-session-id"]) == (b"x-baton-", b"7")
        assert not any(
            name.startswith(b"x-baton")
            for request in cluster.upstream.requests
            for name, _ in request.headers
        )

    run(test)


def test_one_request_may_go_to_one_worker_and_the_next_one_to_two() -> None:
    async def test(cluster: FakeCluster) -> None:
        paths = []
        for headers in ({}, {"x-baton-disaggregate": "never"}, {"x-baton-disaggregate": "strict"}, {}):
            paths.append((await ask(cluster, **headers)).answer_headers[b"x-baton-path"])
        assert paths == [b"disaggregated", b"aggregated", b"disaggregated", b"disaggregated"]

    run(test)
    run_reverse: list[bytes] = []

    async def reverse(cluster: FakeCluster) -> None:
        for headers in ({}, {"x-baton-disaggregate": "always"}):
            run_reverse.append((await ask(cluster, **headers)).answer_headers[b"x-baton-path"])

    run(reverse, disaggregate="never")
    assert run_reverse == [b"aggregated", b"disaggregated"]


def test_a_policy_is_another_ones_for_that_request_only() -> None:
    async def test(cluster: FakeCluster) -> None:
        for header in ("", "x-baton-policy-prefill", "x-baton-policy-decode"):
            for _ in range(2):
                await ask(cluster, **({header: "session", "x-session-id": "7"} if header else {}))

    cluster = run(test, prefill="round_robin", decode="round_robin")
    plans = [record.reasons for record in cluster.telemetry.records if record.reasons is not None]
    reasons = [(str(plan.prefill_choice), str(plan.decode_choice)) for plan in plans]
    usual, prefill, decode = reasons[0], reasons[2], reasons[4]
    assert reasons == [usual, usual, prefill, prefill, decode, decode]
    assert prefill[0] != usual[0]
    assert prefill[1] == usual[1]
    assert (decode[0], decode[1]) == (usual[0], prefill[0])
    served = workers_of(cluster)
    assert served[2][0] == served[3][0]  # the session stays
    assert served[4][1] == served[5][1]
    turns = [record[1] for record in served[:4]]
    assert turns == [turns[0], turns[1]] * 2  # the decode policy is the same one, and takes turns on


def test_what_a_policy_has_learned_stays_with_it() -> None:
    """The policy of the other header is the config's own, with its index; so is one that is named alike."""
    long = {**CHAT, "messages": [{"role": "user", "content": "hi " * 5000}]}

    async def test(cluster: FakeCluster) -> None:
        await ask(cluster, long)
        await ask(cluster, long, **{"x-baton-policy-decode": "random"})
        await ask(cluster, long, **{"x-baton-policy-prefill": "prefix"})
        planner = cluster.flow._routes["m"].planner
        made = cluster.flow._overrides.planner(planner, {"x-baton-policy-prefill": "prefix"})
        assert made is planner

    cluster = run(test, prefill={"policy": "prefix", "kept": 2.0})
    assert len({prefill for prefill, _ in workers_of(cluster)}) == 1


def test_a_worker_is_asked_by_its_name() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(3):
            await ask(
                cluster, **{"x-baton-worker-prefill": "m/prefill/1", "x-baton-worker-decode": "m/decode/0"}
            )
        for _ in range(2):
            await ask(cluster, **{"x-baton-worker-decode": "m/decode/1"})

    served = workers_of(run(test))
    assert served[:3] == [("m/prefill/1", "m/decode/0")] * 3
    assert [decode for _, decode in served[3:]] == ["m/decode/1"] * 2
    assert {prefill for prefill, _ in served[3:]} == {"m/prefill/0", "m/prefill/1"}


def test_a_worker_that_serves_whole_requests_is_asked_by_its_name() -> None:
    async def test(cluster: FakeCluster) -> None:
        await ask(cluster, **{"x-baton-worker-decode": "m/both/0"})
        await ask(cluster, **{"x-baton-worker-decode": "m/decode/0"})
        await ask(cluster, **{"x-baton-worker-decode": "m/decode/0", "x-baton-disaggregate": "never"})

    served = workers_of(run(test, roles=("prefill", "decode", "both")))
    assert served == [(None, "m/both/0"), ("m/prefill/0", "m/decode/0"), (None, "m/decode/0")]


def test_a_prefill_worker_that_is_not_there_is_not_replaced_by_a_decode_worker() -> None:
    async def test(cluster: FakeCluster) -> None:
        wanted = {"x-baton-worker-prefill": "m/prefill/0"}
        cluster.registry.judge.mark_gone(cluster.worker("prefill/0"), "killed")
        for more in ({}, {"x-baton-disaggregate": "always"}):
            answer = await ask(cluster, **wanted, **more)
            assert answer.status == 503
            assert message(answer).startswith("m/prefill/0, which the header x-baton-worker-prefill asks for")
        cluster.registry.judge.mark_ready(cluster.worker("prefill/0"))
        cluster.upstream.refuse(cluster.origin("prefill/0"))
        assert (await ask(cluster, **wanted)).status >= 500  # it fails, and no other is asked

    assert all(prefill != "m/prefill/1" for prefill, _ in workers_of(run(test)))


def test_a_worker_that_is_not_there_is_not_replaced_by_another() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.registry.judge.mark_gone(cluster.worker("decode/0"), "killed")
        answer = await ask(cluster, **{"x-baton-worker-decode": "m/decode/0"})
        assert answer.status == 503
        assert message(answer) == (
            "m/decode/0, which the header x-baton-worker-decode asks for, is out of service"
        )
        answer = await ask(cluster, **{"x-baton-worker-decode": "m/decode/1"})
        assert answer.status == 200
        cluster.registry.judge.mark_ready(cluster.worker("decode/0"))
        cluster.upstream.refuse(cluster.origin("decode/1"))
        answer = await ask(cluster, **{"x-baton-worker-decode": "m/decode/1"})
        assert answer.status >= 500

    run(test)


def test_another_config_allows_other_headers() -> None:
    async def test(cluster: FakeCluster) -> None:
        never = {"x-baton-disaggregate": "never"}
        assert (await ask(cluster, **never)).status == 400
        section = RoutingConfig.model_validate({"overrides": ["x-baton-disaggregate"]})
        config = cluster.config.model_copy(update={"routing": section})
        cluster.core.reconfigure(config)
        assert (await ask(cluster, **never)).answer_headers[b"x-baton-path"] == b"aggregated"

    run(test, overrides=[])
