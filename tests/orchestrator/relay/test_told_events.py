"""What happens to requests is told to the person on call, and a thousand times the same is told once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest

from orchestrator.telemetry.events import PERIOD_S, Event, Events
from tests.orchestrator.failover.test_failover import CHAT as STREAMED
from tests.orchestrator.failover.test_failover import Cluster as Streaming
from tests.orchestrator.fakes import FakeCluster
from tests.orchestrator.relay.test_attempts import (
    CHAT,
    FOUR,
    STREAM,
    answers,
    begins_a_stream,
    cuts_short,
    spoil,
)
from tests.simulation.loop import run_virtually


def told(
    test: Callable[[FakeCluster], Awaitable[None]], made: type[FakeCluster] = FakeCluster, **options: object
) -> list[Event]:
    """The events of a test."""

    async def main() -> list[Event]:
        cluster = made(**{"roles": FOUR, **options})  # type: ignore[arg-type]
        cluster.telemetry.events = events = Events()
        cluster.core.start()
        await asyncio.sleep(1.0)
        await test(cluster)
        await cluster.aclose()
        return list(events.after())

    return run_virtually(main())


@pytest.mark.parametrize(
    ("document", "worker", "kind", "outcome"),
    [
        (CHAT, cuts_short, "request.resent", "cut_short"),
        (STREAM, answers(500), "request.resent", "answered_500"),
    ],
    ids=["whole", "stream"],
)
def test_a_worker_has_failed_a_request(document: object, worker: object, kind: str, outcome: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", worker)  # type: ignore[arg-type]
        await cluster.ask(document, headers=[(b"x-request-id", b"mine")])

    [event] = told(test)
    assert (event.kind, event.subject) == (kind, "m/decode/0")
    assert event.message.startswith(f"m/decode/0 has failed request mine: {outcome} after 0.0 s")


def test_a_stream_goes_on_elsewhere() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert isinstance(cluster, Streaming)
        cluster.cuts = [4]
        await cluster.ask(STREAMED)

    [event] = told(test, Streaming)
    assert (event.kind, event.subject) == ("request.resumed", "m/decode/0")


def test_a_stream_that_nobody_can_go_on_with_was_sent_nowhere() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", begins_a_stream)
        await cluster.ask(STREAM)

    assert told(test) == []


def test_a_worker_that_fails_all_is_told_of_once_and_then_counted() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", answers(500))
        for _ in range(40):
            await cluster.ask(CHAT)
        await asyncio.sleep(PERIOD_S)

    first, following = told(test)
    assert first.kind == following.kind == "request.resent"
    what = r"[1-9]\d* times more in 10 s, the last time: m/decode/0 has failed request"
    assert re.match(what, following.message)


def test_a_request_that_loses_its_workers_is_named() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            spoil(cluster, name, cuts_short)
        await cluster.ask(CHAT, headers=[(b"x-request-id", b"mine")])

    *_, event = told(test)
    assert event.kind == "request.poison"
    assert event.message == "request mine is not sent on: m/decode/0 and m/decode/1 were lost with it"


def test_blocks_that_stay_pinned_are_told_of() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            spoil(cluster, name, cuts_short)
        await cluster.ask(CHAT)
        await asyncio.sleep(60.0)
        cluster.workers.pinned.clear()

    expired = [event for event in told(test) if event.kind == "lease.expired"]
    assert {event.subject for event in expired} <= {"m/prefill/0", "m/prefill/1"}
    assert expired[0].message.startswith("KV blocks stayed on m/prefill/")
