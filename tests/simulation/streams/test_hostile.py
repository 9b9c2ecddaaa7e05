"""Hostile frames end their connection with a reason, and harm nothing else, at either end.

`make fuzz` sends a million of them to processes, whose memory it watches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from bench.fuzz.frames import ToWorker
from bench.fuzz.streams import ASK, CLOSED_WITHIN_S, HostileWorker, Tally
from orchestrator.errors import WorkerError
from orchestrator.transport.base import Origin, request
from orchestrator.transport.mux import MuxUpstream
from tests.simulation.loop import run_virtually
from tests.simulation.streams import ends
from tests.simulation.streams.link import Link, LinkSpec, Listener
from tests.simulation.streams.server import Server

FRAMES = 8_000
LINK = LinkSpec(delay_s=0.001, capacity=2**20, piece=2**18)
GOOD, BAD = Origin("good", 80), Origin("bad", 80)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What either end says of connections that it closes."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "baton.transport")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Consent to upgrades, and answer all else with what was sent, or 413."""
    status = 101 if scope["path"] == "/v1/baton/streams" else 200
    body, more = b"", True
    while more and len(body) < 2**20:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 413 if more else status, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Site:
    """A worker that echoes, and somebody honest who asks it."""

    def __init__(self) -> None:
        self.server = Server(echo, "httptools", ends.wrap)
        self.good = Listener(self.server.make_protocol, lambda: Link(LINK, Random(1)))
        self.asked = 0

    async def ask(self, upstream: MuxUpstream) -> None:
        self.asked += 1
        body = b"%d" % self.asked
        answer = await request(upstream, GOOD, "POST", "/", b"", [body])
        assert (answer.status, await answer.read(1000)) == (200, body)


class Attacker(asyncio.Protocol):
    """It sends what it is told, and reads all or nothing."""

    def __init__(self) -> None:
        self.is_upgraded = asyncio.Event()
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(ASK)

    def data_received(self, data: bytes) -> None:
        self.is_upgraded.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True


async def attack(site: Site, random: Random, tally: Tally) -> None:
    _, attacker = await site.good.connect(Attacker)
    assert isinstance(attacker, Attacker)
    await attacker.is_upgraded.wait()
    if random.random() < 0.2:
        attacker.transport.pause_reading()
    tally.connections += 1
    for burst in ToWorker(random).bursts():
        attacker.transport.write(burst.data)
        tally.count(burst)
        if attacker.is_closed:
            return
        await asyncio.sleep(random.choice((0, 0, 0.01)))
        if burst.is_fatal and attacker.transport.is_reading():
            await asyncio.sleep(CLOSED_WITHIN_S)
            assert attacker.is_closed, burst.data[:20]
    attacker.transport.abort()


def test_a_worker_survives_hostile_frames(log: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        site, tally, random = Site(), Tally(FRAMES), Random(1)
        upstream = ends.upstream(site.good.connect)
        ends.offer(upstream, GOOD)
        await site.ask(upstream)
        while tally.left > 0:
            await asyncio.gather(attack(site, random, tally), attack(site, random, tally))
            await site.ask(upstream)
        assert sum(len(link.server.errors) for link in site.good.links) == 0
        closed = [line for line in log.messages if "was closed for bad frames" in line]
        assert tally.fatal / 2 < len(closed) <= tally.connections
        assert len(set(closed)) > 20  # each with its reason
        await asyncio.sleep(CLOSED_WITHIN_S)
        assert (len(site.server.state.connections), len(site.server.state.tasks)) == (1, 0)
        assert upstream.stats().connects == 1
        await upstream.aclose()

    run_virtually(main())


async def leg(upstream: MuxUpstream, random: Random) -> None:
    """Ask the hostile worker: whatever it does is an answer, or an error of its own."""
    ends.offer(upstream, BAD)
    body = random.choice((b"", b"small", bytes(300_000)))
    try:
        async with asyncio.timeout(0.5):
            answer = await request(upstream, BAD, "POST", "/", b"", [body])
            try:
                await answer.read(1 << 20)
            finally:
                answer.abort()
    except (WorkerError, TimeoutError):
        pass


def test_an_orchestrator_survives_hostile_frames(log: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        site, tally, random = Site(), Tally(FRAMES), Random(1)
        bad = Listener(lambda: HostileWorker(random, tally), lambda: Link(LINK, Random(2)))

        async def connect(factory: Any, host: str, *place: Any, **options: Any) -> Any:
            return await (bad if host == BAD.host else site.good).connect(factory)

        upstream = ends.upstream(connect)
        ends.offer(upstream, GOOD)
        await site.ask(upstream)
        while tally.left > 0:
            await asyncio.gather(*(leg(upstream, random) for _ in range(16)))
            await site.ask(upstream)
        assert sum(len(link.client.errors) for link in bad.links) == 0
        await asyncio.sleep(2 * CLOSED_WITHIN_S)
        assert tally.wrong == []
        reasons = {line for line in log.messages if "sent" in line and "closed" in line}
        assert len(reasons) > 20
        assert (upstream.stats().busy, ends.streams_at_orchestrator(upstream)) == (0, 0)
        assert len(site.good.links) == 1
        await upstream.aclose()

    run_virtually(main())
