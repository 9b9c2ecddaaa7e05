"""What is told of requests, by the real data plane on workers in memory."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.telemetry.history import CLIENT_GONE, History
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.timeline import Timelines
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.failover.test_failover import CHAT as STREAMED
from tests.orchestrator.failover.test_failover import Cluster as Streaming
from tests.orchestrator.fakes import SSE, FakeCluster, FakeExchange, token
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
FOUR = ("prefill", "prefill", "decode", "decode")
ARRIVED_S = 5.0
WALL = 1_000_000.0  # what the wall clock says at the loop's 0.0


class Site:
    def __init__(self, made: type[FakeCluster] = FakeCluster, **options: Any) -> None:
        self.cluster = made(**{"roles": FOUR, **options})
        plane, time = self.cluster.plane, self.cluster.plane.time
        self.history = History(["m"], plane.under_way, self.cluster.telemetry.records, time=time)
        self.timelines = Timelines(self.history, 3, self._others, lambda: WALL + time(), time)

    def _others(self, model: str | None, role: str) -> list[tuple[str, str]]:
        workers = self.cluster.registry.workers
        return [(worker.name, worker.state) for worker in workers if worker.address.role == role]

    async def ask(self, document: Any, name: str = "mine") -> FakeExchange:
        return await self.cluster.ask(document, headers=[(b"x-request-id", name.encode())])

    def told(self, name: str = "mine") -> dict[str, Any]:
        """All that is known of the newest request of this name, as a reader of JSON has it."""
        found: dict[str, Any] = json.loads(
            json.dumps(self.timelines.timeline(self.history.find(RequestQuery(name=name))[0]))
        )
        return found


def run(test: Callable[[Site], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        site = Site(**options)
        site.cluster.core.start()
        await asyncio.sleep(ARRIVED_S)
        await test(site)
        await site.cluster.aclose()

    run_virtually(main())


async def dies(request: MemoryRequest, reply: MemoryReply) -> None:
    await asyncio.sleep(2.0)
    reply.cut_short()


async def begins_and_dies(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(token("a"))
    await asyncio.sleep(1.0)
    reply.cut_short()


async def never_answers(request: MemoryRequest, reply: MemoryReply) -> None:
    await asyncio.Event().wait()


def spoil(site: Site, name: str, worker: Callable[[MemoryRequest, MemoryReply], Awaitable[None]]) -> None:
    site.cluster.upstream.serve(site.cluster.origin(name), worker)


def what(told: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(moment["what"], moment["worker"]) for moment in told["timeline"]]


def test_a_request_that_was_served() -> None:
    async def test(site: Site) -> None:
        await site.ask(CHAT)
        told = site.told()
        assert what(told) == [
            ("arrived", None),
            ("left the queue", None),
            ("prefill sent", "m/prefill/0"),
            ("prefill answered, handed over", "m/prefill/0"),
            ("decode sent", "m/decode/0"),
            ("first byte to the client", None),
            ("last byte to the client", None),
        ]
        assert told["received"] == WALL + ARRIVED_S
        plain = ("id", "state", "api", "model", "status", "error", "path", "attempts", "process", "stream")
        assert [told[name] for name in plain] == [
            *("mine", "ended", "/v1/chat/completions", "m", 200, None, "disaggregated", 1, 3, False)
        ]
        assert told["bytes_in"] == len(json.dumps(CHAT))
        assert told["bytes_out"] > 0
        assert told["handoff"]["kv"] == "transferred"
        assert told["handoff"]["lease"].startswith("consumed")
        assert told["failed_attempts"] == []
        assert told["plan"]["whole_reason"] is None
        prefill = told["plan"]["prefill"]
        assert (prefill["worker"], prefill["reason"]) == ("m/prefill/0", "It is the next in turn.")
        assert [one["worker"] for one in prefill["candidates"]] == ["m/prefill/0", "m/prefill/1"]

    run(test, routing=RoutingConfig.model_validate({"prefill": "round_robin"}))


def test_the_numbers_that_spoke_for_a_worker() -> None:
    async def test(site: Site) -> None:
        await site.ask(CHAT)
        prefill = site.told()["plan"]["prefill"]
        [chosen] = [one for one in prefill["candidates"] if one["chosen"]]
        assert chosen["worker"] == prefill["worker"]
        assert {"cost_s", "wait_s", "own_s", "evict_s", "cached_tokens"} <= set(chosen["terms"])
        assert chosen["terms"] == prefill["terms"]
        [other] = [one for one in prefill["candidates"] if not one["chosen"]]
        assert set(other["terms"]) == set(chosen["terms"])
        await site.ask(CHAT, "next")  # within a tenth of a second: only what was chosen is known of it
        chosen, other = sorted(
            site.told("next")["plan"]["prefill"]["candidates"], key=lambda one: not one["chosen"]
        )
        assert (chosen["terms"] != {}, other["terms"]) == (True, {})
        await asyncio.sleep(0.2)
        await site.ask(CHAT, "later")
        assert all(one["terms"] for one in site.told("later")["plan"]["prefill"]["candidates"])
        assert prefill["reason"].startswith("It costs the least")

    run(test, routing=RoutingConfig.model_validate({"prefill": "prefix"}))


def test_a_worker_that_failed_and_why_it_was_no_candidate_then() -> None:
    async def test(site: Site) -> None:
        spoil(site, "prefill/0", dies)
        await site.ask(CHAT)
        told = site.told()
        assert ("was given to a worker that failed it", "m/prefill/0") in what(told)
        assert ("had failed there: cut_short", "m/prefill/0") in what(told)
        [failed] = told["failed_attempts"]
        assert (failed["worker"], failed["outcome"], failed["then"]) == ("m/prefill/0", "cut_short", "resent")
        assert failed["took_ms"] == pytest.approx(2000.0, abs=10.0)
        assert told["attempts"] == 2
        assert told["plan"]["prefill"]["worker"] == "m/prefill/1"
        [rejected] = told["plan"]["prefill"]["rejected"]
        assert (rejected["worker"], rejected["why"]) == (
            "m/prefill/0",
            "it had failed the request: cut_short",
        )
        moments = [moment["ms"] for moment in told["timeline"]]
        assert moments == sorted(moments)

    run(test)


def test_a_stream_that_nobody_could_go_on_with() -> None:
    async def test(site: Site) -> None:
        spoil(site, "decode/0", begins_and_dies)
        await site.ask(STREAM)
        told = site.told()
        [failed] = told["failed_attempts"]
        assert (failed["worker"], failed["then"]) == ("m/decode/0", "ended")
        assert what(told)[-1] == ("ended with worker_cut_short", None)

    run(test)


def test_a_stream_that_another_worker_went_on_with() -> None:
    async def test(site: Site) -> None:
        cluster = site.cluster
        assert isinstance(cluster, Streaming)
        cluster.cuts = [4]
        document = STREAMED | {"messages": CHAT["messages"]}
        await site.ask(document)
        told = site.told()
        [failed] = told["failed_attempts"]
        assert (failed["worker"], failed["then"]) == ("m/decode/0", "resumed")
        assert (told["status"], told["error"]) == (200, None)
        assert told["decode_worker"] != "m/decode/0"
        assert ("decode sent", told["decode_worker"]) in what(told)

    run(test, made=Streaming)


def test_the_moments_of_an_attempt_that_a_decode_worker_has_failed() -> None:
    async def test(site: Site) -> None:
        spoil(site, "decode/0", dies)
        await site.ask(CHAT)
        assert what(site.told()) == [
            ("arrived", None),
            ("left the queue", None),
            ("prefill sent", "m/prefill/0"),
            ("prefill answered, handed over", "m/prefill/0"),
            ("decode sent", "m/decode/0"),
            ("had failed there: cut_short", "m/decode/0"),
            ("prefill sent", "m/prefill/1"),
            ("prefill answered, handed over", "m/prefill/1"),
            ("decode sent", "m/decode/1"),
            ("first byte to the client", None),
            ("last byte to the client", None),
        ]

    run(test, routing=RoutingConfig.model_validate({"prefill": "round_robin"}))


def test_a_hand_off_that_two_attempts_share_is_told_once() -> None:
    async def test(site: Site) -> None:
        site.cluster.upstream.refuse(site.cluster.origin("decode/0"))
        await site.ask(CHAT)
        assert what(site.told())[2:-2] == [
            ("prefill sent", "m/prefill/0"),
            ("prefill answered, handed over", "m/prefill/0"),
            ("was given to a worker that failed it", "m/decode/0"),
            ("had failed there: unreachable", "m/decode/0"),
            ("decode sent", "m/decode/1"),
        ]

    run(test, routing=RoutingConfig.model_validate({"prefill": "round_robin"}))


def test_the_moments_of_each_worker_that_went_on_with_a_stream() -> None:
    async def test(site: Site) -> None:
        cluster = site.cluster
        assert isinstance(cluster, Streaming)
        cluster.cuts = [4]
        exchange = await cluster.ask(STREAMED | {"messages": CHAT["messages"]})
        [name] = {json.loads(line[6:])["id"] for line in exchange.sent.split(b"\n") if b'"id"' in line}
        told = site.told(name)
        assert (told["answer_id"], told["attempts"]) == (name, 2)
        assert told["worker_id"] not in name
        prefilled = [worker for text, worker in what(told) if text == "prefill answered, handed over"]
        assert prefilled == [worker for text, worker in what(told) if text == "prefill sent"]
        assert None not in prefilled
        order = [text for text, _ in what(told) if text.startswith(("prefill", "decode", "sent", "had"))]
        legs = ["prefill sent", "prefill answered, handed over", "decode sent"]
        assert order == [*legs, "had failed there: cut_short", *legs]

    run(test, made=Streaming)


@pytest.mark.parametrize(
    ("path", "document", "named"),
    [
        ("/v1/chat/completions", CHAT, "chatcmpl-{}"),
        ("/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 5}, "cmpl-{}"),
        ("/tokenize", {"model": "m", "prompt": "hi"}, None),
    ],
)
def test_what_the_answer_is_called(path: str, document: Any, named: str | None) -> None:
    """Fake workers do not make ids as real ones do, so here it is what these would make."""

    async def test(site: Site) -> None:
        own = [(b"x-request-id", b"mine")]
        for headers, fields, name in (
            (own, {}, "mine"),
            ([(b"x-request-id", b"a/strange one")], {}, "a/strange one"),
            ([], {"request_id": 'gro\u00df "1"'}, 'gro\u00df "1"'),
            ([(b"x-request-id", b"x" * 300)], {}, None),  # that is not kept
            ([], {}, ""),  # then it is that of the leg
        ):
            await site.cluster.ask(document | fields, path=path, headers=headers)
            told = json.loads(
                json.dumps(site.timelines.timeline(site.history.find(RequestQuery(limit=1))[0]))
            )
            leg = told["worker_id"] if name in ("", None) else name
            assert told["worker_id"] == leg
            assert told["answer_id"] == (None if named is None or name is None else named.format(leg))
            await asyncio.sleep(1.0)

    run(test)


def test_a_client_that_left() -> None:
    async def test(site: Site) -> None:
        spoil(site, "decode/0", never_answers)
        exchange = FakeExchange(json.dumps(CHAT).encode(), headers=[(b"x-request-id", b"mine")])
        serving = asyncio.create_task(site.cluster.serve(exchange))
        await asyncio.sleep(3.0)
        under_way = site.told()
        assert (under_way["state"], under_way["status"]) == ("decodes", None)
        assert under_way["total_ms"] == pytest.approx(3000.0, abs=10.0)
        assert what(under_way)[-1] == ("decode sent", "m/decode/0")
        exchange.leave()
        await serving
        told = site.told()
        assert (told["client_gone"], told["error"], told["status"]) == (True, CLIENT_GONE, 499)
        assert what(told)[-1] == ("the client had gone", None)
        assert told["answer_id"] == under_way["answer_id"] != ""

    run(test)


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b'{"model":"nope","messages":[]}', b"\xff" * 1000])
def test_a_request_that_was_refused(document: bytes) -> None:
    async def test(site: Site) -> None:
        await site.ask(document)
        told = site.told()
        assert told["status"] in (400, 404)
        assert what(told)[-1] == (f"ended with {told['error']}", None)
        assert (told["plan"], told["handoff"], told["answer_id"]) == (None, None, None)
        assert told["bytes_in"] == len(document)

    run(test)


def test_a_request_without_workers() -> None:
    async def test(site: Site) -> None:
        for worker in site.cluster.registry.workers:
            site.cluster.registry.drain(worker)
        await site.ask(CHAT)
        told = site.told()
        assert (told["status"], told["error"]) == (503, "no_worker")

    run(test)


def test_what_the_client_calls_it_in_its_body_finds_it() -> None:
    async def test(site: Site) -> None:
        await site.cluster.ask(CHAT | {"request_id": "my own/name"})
        await site.cluster.ask(CHAT | {"request_id": "x" * 10_000})
        assert site.told("chatcmpl-my own/name")["status"] == 200
        assert site.history.find(RequestQuery(name="x" * 10_000)) == []

    run(test)


def test_what_is_kept_of_requests_holds_nothing_large_alive() -> None:
    """Records of requests of a megabyte are kept; their bodies, scopes and exchanges are not."""

    async def test(site: Site) -> None:
        content = "word " * 200_000
        gone: list[weakref.ref[FakeExchange]] = []

        async def ask(count: int) -> None:
            for index in range(count):
                document = CHAT | {"messages": [{"role": "user", "content": f"{index} {content}"}]}
                exchange = await site.ask(document)
                gone.append(weakref.ref(exchange))
            records = list(site.cluster.telemetry.records)
            site.cluster.telemetry.records.clear()
            site.cluster.upstream.requests.clear()
            site.history.note(records)

        await ask(3)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await ask(20)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert len(site.history.find(RequestQuery(limit=100))) == 23
        assert [ref() for ref in gone] == [None] * 23
        assert grown < 20 * 20_000

    run(test, routing=RoutingConfig.model_validate({"prefill": "prefix", "decode": "least_tokens"}))
