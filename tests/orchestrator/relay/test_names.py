"""What clients can name: models with pools of their own, their adapters, and aliases of both; at all
endpoints.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec import structs

from orchestrator.api.audio import PATHS as AUDIO
from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.config.options import RoutingConfig
from orchestrator.routing.policies.prefix_legs import PrefixChoice
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.worker import Worker
from tests.orchestrator.fakes import JSON, FakeCluster, read
from tests.orchestrator.wire.test_forms import form

Test = Callable[[FakeCluster], Awaitable[None]]
NAMED = [path for path in ENDPOINTS if "{" not in path]
TWO_LEGS = ("/v1/chat/completions", "/v1/completions")
ADAPTERS = {"sql": ("prefill/0", "prefill/1", "decode/0"), "poems": ("prefill/1", "decode/1")}
ROLES = ("prefill", "decode", "prefill", "decode")
DOCUMENT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": "hi",
    "max_tokens": 5,
    "priority": 1.50,
}


def run(test: Test, **options: Any) -> FakeCluster:
    """Two models, `m` with aliases and adapters that workers list."""

    async def main() -> FakeCluster:
        aliases = {"gpt-4": "m", "gpt-5": "n", "gpt-sql": "sql", "gpt-listed": "listed"}
        named: dict[str, Any] = {"models": ("m", "n"), "adapters": ("listed",), "aliases": aliases}
        cluster = FakeCluster(**({"roles": ROLES} | named | options))
        for adapter, names in ADAPTERS.items():
            for name in names:
                add(cluster, cluster.worker(name), adapter)
        await asyncio.wait_for(test(cluster), 60)
        await cluster.aclose()
        return cluster

    return asyncio.run(main())


def add(cluster: FakeCluster, worker: Worker, *adapters: str) -> None:
    """Let a worker list more adapters."""
    known = worker.introduction
    cluster.registry.announce(worker, structs.replace(known, adapters=(*known.adapters, *adapters)))


def body_for(path: str, model: str) -> tuple[bytes, bytes]:
    """A body that names the model, and its type."""
    if path in AUDIO:
        return form(("model", model.encode(), ""), ("file", b"RIFF", "")), b"multipart/form-data; boundary=b0"
    return json.dumps(DOCUMENT | {"model": model}).encode(), b"application/json"


def name_in(path: str, request: MemoryRequest) -> str:
    if path in AUDIO:
        return bytes(request.body).split(b'name="model"\r\n\r\n')[1].partition(b"\r\n")[0].decode()
    name: str = read(request)["model"]
    return name


async def transcribe(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(200, b'{"text":"hi"}', JSON)


def legs_of(cluster: FakeCluster, path: str) -> list[MemoryRequest]:
    return [request for request in cluster.upstream.requests if request.target == path]


@pytest.mark.parametrize("path", NAMED)
@pytest.mark.parametrize(
    ("asked", "named", "model"),
    [
        ("m", "m", "m"),
        ("n", "n", "n"),
        ("gpt-4", "m", "m"),
        ("gpt-5", "n", "n"),
        ("sql", "sql", "m"),
        ("listed", "listed", "m"),
        ("gpt-sql", "sql", "m"),
        ("gpt-listed", "listed", "m"),
    ],
)
@pytest.mark.parametrize("transport", ["json", "msgpack"])
def test_all_endpoints_serve_all_names(path: str, asked: str, named: str, model: str, transport: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        body, content_type = body_for(path, asked)
        if path in AUDIO:
            for worker in cluster.registry.workers:
                cluster.upstream.serve(worker.origin, transcribe)
        await cluster.ask(body, path=path, content_type=content_type)

    cluster = run(test, transport=transport)
    legs = legs_of(cluster, path)
    assert len(legs) >= (2 if path in TWO_LEGS else 1)
    assert {name_in(path, leg) for leg in legs} == {named}
    own = {worker.origin for worker in cluster.registry.workers if worker.address.model == model}
    assert {leg.origin for leg in legs} <= own
    (record,) = cluster.telemetry.records
    assert record.model_index == ["m", "n"].index(model)


@pytest.mark.parametrize("path", NAMED)
def test_a_name_that_nobody_has_is_unknown(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("gpt-3", "SQL", "m/sql"):
            body, content_type = body_for(path, name)
            answer = await cluster.ask(body, path=path, content_type=content_type)
            assert answer.status == 404
            assert b"there is: m, n, gpt-4" in answer.sent

    assert run(test).upstream.requests == []


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_has_the_name_that_its_worker_gives(is_stream: bool) -> None:
    """As of vLLM's --served-model-name, of which answers have the first: nothing of a stream is changed."""

    async def test(cluster: FakeCluster) -> None:
        document = {**DOCUMENT, "stream": is_stream, "stream_options": {"include_usage": True}}
        document = document if is_stream else {**DOCUMENT}
        plain = await cluster.ask(document | {"model": "m"})
        aliased = await cluster.ask(document | {"model": "gpt-4"})
        assert aliased.status == 200
        assert aliased.sent == plain.sent

    run(test)


# --- adapters -----------------------------------------------------------------------------------


def test_adapters_are_asked_of_workers_that_list_them() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(8):
            assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 200
        for _ in range(8):
            assert (await cluster.ask(DOCUMENT | {"model": "m"})).status == 200

    cluster = run(test, routing=RoutingConfig.model_validate({"prefill": "round_robin"}))
    asked = [read(leg)["model"] for leg in cluster.upstream.requests]
    for model, names in (
        ("poems", ADAPTERS["poems"]),
        ("m", ("prefill/0", "prefill/1", "decode/0", "decode/1")),
    ):
        origins = {
            leg.origin for leg, name in zip(cluster.upstream.requests, asked, strict=True) if name == model
        }
        assert origins == {cluster.origin(name) for name in names}


def test_an_adapter_of_the_config_is_asked_of_all_until_one_lists_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(4):
            await cluster.ask(DOCUMENT | {"model": "listed"})
        assert {leg.origin for leg in cluster.legs("prefill")} == {
            cluster.origin("prefill/0"),
            cluster.origin("prefill/1"),
        }
        cluster.upstream.requests.clear()
        add(cluster, cluster.worker("prefill/1"), "listed")
        for _ in range(4):
            await cluster.ask(DOCUMENT | {"model": "listed"})
        assert {leg.origin for leg in cluster.legs("prefill")} == {cluster.origin("prefill/1")}
        assert len({leg.origin for leg in cluster.legs("decode")}) == 2

    run(test)


def test_who_has_an_adapter_changes_while_it_is_asked_for() -> None:
    async def test(cluster: FakeCluster) -> None:
        only = cluster.worker("decode/1")
        assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 200
        cluster.registry.judge.mark_gone(only, "killed")
        assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 503
        assert (await cluster.ask(DOCUMENT | {"model": "m"})).status == 200
        cluster.registry.judge.mark_ready(only)
        assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 200
        for worker in cluster.registry.workers:
            cluster.registry.announce(worker, Introduction(None, None))
        assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 404
        add(cluster, cluster.worker("decode/0", "n"), "poems")
        assert (await cluster.ask(DOCUMENT | {"model": "poems"})).status == 200  # it is of another model now
        assert cluster.upstream.requests[-1].origin == cluster.worker("decode/0", "n").origin

    run(test)


def test_a_model_goes_before_an_adapter_of_its_name() -> None:
    async def test(cluster: FakeCluster) -> None:
        add(cluster, cluster.worker("decode/0"), "n", "gpt-5")
        for name in ("n", "gpt-5"):
            await cluster.ask(DOCUMENT | {"model": name})
        own = {worker.origin for worker in cluster.registry.workers if worker.address.model == "n"}
        assert {leg.origin for leg in cluster.upstream.requests} <= own

    run(test)


def test_a_lost_leg_of_an_adapter_goes_to_another_worker_that_has_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        first = cluster.upstream.requests
        gone = cluster.worker("prefill/0")
        cluster.upstream.refuse(gone.origin)
        for _ in range(3):
            assert (await cluster.ask(DOCUMENT | {"model": "sql"})).status == 200
        assert {leg.origin for leg in first if leg.origin != gone.origin} == {
            cluster.origin("prefill/1"),
            cluster.origin("decode/0"),
        }

    run(test)


def test_a_worker_of_an_adapter_that_asked_for_a_rest_gets_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        await cluster.ask(DOCUMENT | {"model": "sql"})  # its pools are there
        cluster.registry.rest(cluster.worker("prefill/0"), 30.0)
        cluster.upstream.requests.clear()
        for _ in range(4):
            await cluster.ask(DOCUMENT | {"model": "sql"})
        assert {leg.origin for leg in cluster.legs("prefill")} == {cluster.origin("prefill/1")}

    run(test)


def test_prompts_of_adapters_share_no_cache_and_those_of_aliases_do() -> None:
    """The policy `prefix` tells adapters apart, and takes an alias for what it names."""

    async def test(cluster: FakeCluster) -> None:
        long = DOCUMENT | {"messages": [{"role": "user", "content": "hi " * 5000}]}
        for name in ("m", "gpt-4", "sql", "gpt-sql"):
            assert (await cluster.ask(long | {"model": name})).status == 200

    cluster = run(test, routing=RoutingConfig.model_validate({"prefill": "prefix"}))
    plans = [record.reasons for record in cluster.telemetry.records if record.reasons is not None]
    choices = [plan.prefill_choice for plan in plans]
    known = [choice.matched > 0 for choice in choices if isinstance(choice, PrefixChoice)]
    assert known == [False, True, False, True]
