"""Many legs on one connection: how it is opened, shared, found dead and given up, and what a worker may not do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import WorkerCutShort, WorkerGarbage, WorkerUnreachable
from orchestrator.transport import mux as module
from orchestrator.transport.base import Answer, Origin
from orchestrator.transport.mux import MuxUpstream, upstream
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.headers import header_block
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    HEADER,
    LAST,
    LEAVE,
    MAX_CREDIT,
    MAX_PAYLOAD,
    OPEN,
    PING,
    RESET,
    RESET_BROKEN,
    RESET_CANCELLED,
    RESET_REFUSED,
    WINDOW,
    credit,
    frame,
    reset,
)
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.transport.harness import PeerConnection, chunked, fixed, peer, replies, scenario, turns, until
from tests.orchestrator.transport.streams import (
    SWITCHED,
    Framed,
    answer_frames,
    get,
    head_frame,
    mux,
    post,
    streams,
)

LARGE = bytes(4 * WINDOW)


async def echo(framed: Framed) -> None:
    """Answer every request with its body."""
    while True:
        stream, _, body = await framed.request()
        framed.write(answer_frames(stream, body))


# --- how it is opened -----------------------------------------------------------------------------


@scenario
async def test_the_upgrade_has_what_the_worker_wants_and_the_streams_what_http_would_have() -> None:
    heads: list[bytes] = []

    async def script(connection: PeerConnection) -> None:
        framed = Framed(connection)
        heads.append(await framed.upgrade())
        stream, head, body = await framed.request()
        heads.append(head)
        framed.write(answer_frames(stream, body))
        await connection.wait_closed()

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True, header_block([(b"authorization", b"Bearer x")]))
        assert await get(upstream, worker.origin, b"body") == (200, b"body")
        host = b"host: 127.0.0.1:%d\r\n" % worker.origin.port
        assert heads == [
            b"GET /v1/baton/streams HTTP/1.1\r\n%bauthorization: Bearer x\r\nconnection: Upgrade\r\n"
            b"upgrade: baton-streams/1\r\ncontent-length: 0\r\n\r\n" % host,
            b"POST /v1/x\r\n%bcontent-type: application/json\r\ncontent-length: 4\r\n" % host,
        ]


@scenario
async def test_all_who_come_while_it_is_opened_share_it() -> None:
    async with streams(echo) as (upstream, origin):
        bodies = [b"%d" % number for number in range(50)]
        answers = await asyncio.gather(*(get(upstream, origin, body) for body in bodies))
        assert answers == [(200, body) for body in bodies]
        assert await get(upstream, origin) == (200, b"{}")
        assert upstream.stats() == (1, 0, 1, 1, 0)


@scenario
async def test_it_is_opened_even_if_who_asked_first_is_cancelled() -> None:
    may_go_on = asyncio.Event()

    async def script(connection: PeerConnection) -> None:
        await connection.peek_head()
        await may_go_on.wait()
        framed = Framed(connection)
        await framed.upgrade()
        await echo(framed)

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        first, second = (asyncio.create_task(get(upstream, worker.origin)) for _ in range(2))
        await until(lambda: bool(worker.connections))
        first.cancel()
        may_go_on.set()
        assert await second == (200, b"{}")
        assert first.cancelled()
        assert upstream.stats().connects == 1


@scenario
async def test_a_worker_that_was_not_offered_gets_http() -> None:
    async with peer(replies(fixed(b"plain"))) as worker, mux() as upstream:
        upstream.offer(worker.origin, False)
        assert await get(upstream, worker.origin) == (200, b"plain")


REFUSALS = {
    "an error page": fixed(b"no such page"),
    "not found": b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
    "another version": b"HTTP/1.1 426 Upgrade Required\r\nupgrade: baton-streams/2\r\n\r\n",
    "another protocol": SWITCHED.replace(b"baton-streams/1", b"websocket"),
    "no protocol": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "no http": b"SSH-2.0-OpenSSH\r\n\r\n",
    "an endless head": b"HTTP/1.1 101 Switching Protocols\r\nx: " + b"y" * 20_000,
}


@pytest.mark.parametrize("refusal", list(REFUSALS))
def test_a_worker_that_refuses_gets_http(refusal: str, caplog: pytest.LogCaptureFixture) -> None:
    refusing = True

    async def script(connection: PeerConnection) -> None:
        if not (await connection.peek_head()).startswith(b"GET /v1/baton/streams"):
            await replies(fixed(b"plain"), fixed(b"plain"))(connection)
        elif refusing:
            await connection.send(REFUSALS[refusal])
            await connection.wait_closed()
        else:
            framed = Framed(connection)
            await framed.upgrade()
            await echo(framed)

    @scenario
    async def test() -> None:
        nonlocal refusing
        refusing = True
        async with peer(script) as worker, mux() as upstream:
            upstream.offer(worker.origin, True)
            for _ in range(2):
                assert await get(upstream, worker.origin) == (200, b"plain")
            assert len(worker.connections) == 2  # it was asked once
            assert caplog.text.count("its legs go by HTTP") == 1
            refusing = False
            upstream.offer(worker.origin, True)
            assert await get(upstream, worker.origin) == (200, b"{}")
            caplog.clear()

    for new_loop in LOOPS:
        test(new_loop=new_loop)


@scenario
async def test_a_worker_that_has_refused_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFUSED_S", -1.0)
    async with peer(replies(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        for asked in range(1, 4):
            assert (await (await upstream.send(worker.origin, "GET", "/", b"", [])).read(100)) == b""
            assert len(worker.connections) == 2 * asked
