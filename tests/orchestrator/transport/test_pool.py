"""The pool against a peer that does what a worker must not, and what one may."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
from collections.abc import Callable

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import WorkerCutShort, WorkerError, WorkerGarbage, WorkerUnreachable
from orchestrator.transport.base import Answer, Origin, request
from orchestrator.transport.pool import MAX_OVERHEAD, PooledUpstream
from orchestrator.wire.headers import header_block
from tests.orchestrator.transport.harness import (
    PeerConnection,
    chunked,
    client_context,
    fixed,
    get,
    peer,
    pool,
    post,
    replies,
    run_on,
    scenario,
    server_context,
    until,
)

OK = fixed(b"ok")
LARGE = bytes(24 * 1024 * 1024)  # more than the sockets' buffers hold


# --- keeping connections ------------------------------------------------------------------------


@scenario
async def test_a_finished_leg_leaves_its_connection_to_the_next() -> None:
    async with peer(replies(OK, chunked(b"a", b"b"), OK)) as worker, pool() as upstream:
        assert [await get(upstream, worker.origin) for _ in range(3)] == [
            (200, b"ok"),
            (200, b"ab"),
            (200, b"ok"),
        ]
        stats = upstream.stats()
        assert (stats.idle, stats.busy, stats.connects, stats.reuses, stats.retries) == (1, 0, 1, 2, 0)
        assert len(worker.connections) == 1


@scenario
async def test_the_connection_used_last_is_used_first() -> None:
    used: list[PeerConnection] = []

    async def script(connection: PeerConnection) -> None:
        while True:
            await connection.request()
            used.append(connection)
            await connection.send(OK)

    async with peer(script) as worker, pool() as upstream:
        await asyncio.gather(get(upstream, worker.origin), get(upstream, worker.origin))
        last = used[-1]
        for _ in range(3):
            await get(upstream, worker.origin)
        assert used[-3:] == [last] * 3
        assert upstream.stats().idle == 2


@scenario
async def test_connections_are_kept_per_origin() -> None:
    async with peer(replies(OK, OK)) as one, peer(replies(OK, OK)) as two, pool() as upstream:
        for worker in (one, two, one, two):
            await get(upstream, worker.origin)
        assert (len(one.connections), len(two.connections)) == (1, 1)
        assert upstream.stats().idle == 2


@scenario
async def test_an_idle_connection_past_its_limit_is_closed_and_never_used() -> None:
    async with peer(replies(OK, OK)) as worker, pool(idle_limit_s=0.05) as upstream:
        await get(upstream, worker.origin)
        await worker.wait_all_closed()  # by the sweep
        assert upstream.stats().idle == 0
        await get(upstream, worker.origin)
        assert len(worker.connections) == 2
        await asyncio.sleep(0.1)
        await get(upstream, worker.origin)
        stats = upstream.stats()
        assert (stats.connects, stats.reuses, stats.retries) == (3, 0, 0)


@scenario
async def test_an_idle_connection_that_the_worker_closes_is_dropped() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(OK)
        connection.close()

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        await until(lambda: upstream.stats().idle == 0)
        assert await get(upstream, worker.origin) == (200, b"ok")
        assert upstream.stats().retries == 0


@scenario
async def test_an_idle_connection_on_which_something_arrives_is_dropped() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(OK, b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        await until(lambda: upstream.stats().idle == 0)
        await worker.wait_all_closed()
        assert await get(upstream, worker.origin) == (200, b"ok")


@pytest.mark.parametrize(
    "answer",
    [
        fixed(b"ok", fields=b"connection: close\r\n"),
        fixed(b"ok", fields=b"Connection: Close\r\n"),
        chunked(b"ok", fields=b"connection: close\r\n"),
        OK.replace(b"1.1", b"1.0"),
        OK + b"x",
        OK + OK,
        chunked(b"ok") + b"0\r\n\r\n",
        fixed(b"ok", fields=b"connection: close\r\n") + OK,
    ],
)
@scenario
async def test_answers_whose_connection_is_not_kept(answer: bytes) -> None:
    async with peer(replies(answer)) as worker, pool() as upstream:
        for _ in range(2):
            assert await get(upstream, worker.origin) == (200, b"ok")
            assert upstream.stats().idle == 0
        await worker.wait_all_closed()
        assert len(worker.connections) == 2


@scenario
async def test_http_1_0_may_ask_for_keeping() -> None:
    answer = fixed(b"ok", fields=b"connection: keep-alive\r\n").replace(b"1.1", b"1.0")
    async with peer(replies(answer, answer)) as worker, pool() as upstream:
        for _ in range(2):
            assert await get(upstream, worker.origin) == (200, b"ok")
        assert len(worker.connections) == 1


# --- reading answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", 304, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\ncontent-type: no\r\n\r\n" * 3 + OK, 200, b"ok"),
        (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2;x=y;z\r\nok\r\n0\r\nx: y\r\n\r\n",
            200,
            b"ok",
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n00001\r\no\r\n1\r\nk\r\n000\r\n\r\n",
            200,
            b"ok",
        ),
        (chunked(), 200, b""),
        (chunked(b"\r\n0\r\n\r\n"), 200, b"\r\n0\r\n\r\n"),
        (fixed(b"bad", b"400 Bad Request"), 400, b"bad"),
        (fixed(b"x", b"599 Odd"), 599, b"x"),
    ],
)
@scenario
async def test_answers_that_are_valid(answer: bytes, status: int, body: bytes) -> None:
    async with peer(replies(answer, answer)) as worker, pool() as upstream:
        for _ in range(2):
            assert await get(upstream, worker.origin) == (status, body)
        assert upstream.stats().reuses == 1


@scenario
async def test_headers_are_lower_case_and_the_last_of_a_name_wins() -> None:
    answer = fixed(b"", fields=b"X-A: 1\r\nContent-TYPE: a/b\r\nx-empty:\r\nx-a: 2\r\n")
    async with (
        peer(replies(b"HTTP/1.1 100 C\r\nx-interim: 1\r\n\r\n" + answer)) as worker,
        pool() as upstream,
    ):
        headers = (await post(upstream, worker.origin)).headers
        assert headers == {b"content-type": b"a/b", b"x-empty": b"", b"x-a": b"2", b"content-length": b"0"}


@scenario
async def test_trailers_do_not_become_headers() -> None:
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-late: 1\r\n\r\n"
    async with peer(replies(answer, answer)) as worker, pool() as upstream:
        for _ in range(2):
            response = await post(upstream, worker.origin)
            await response.read(0)
            assert response.headers == {b"transfer-encoding": b"chunked"}


@scenario
async def test_a_body_may_end_with_the_connection() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\n", b"one ", b"two")

    async with peer(script) as worker, pool() as upstream:
        assert await get(upstream, worker.origin) == (200, b"one two")
        assert upstream.stats().idle == 0


@scenario
async def test_a_tls_body_may_end_with_a_goodbye() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\n", b"one ", b"two")

    async with peer(script, tls=server_context(), client_tls=client_context()) as worker, pool() as upstream:
        assert await get(upstream, worker.origin) == (200, b"one two")


@scenario
async def test_a_reset_is_not_the_end_of_a_body() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\n", b"one ")
        await go.wait()
        connection.reset()

    go = asyncio.Event()
    async with peer(script) as worker, pool() as upstream:
        answer = await post(upstream, worker.origin)
        assert await answer.chunk() == b"one "
        go.set()
        with pytest.raises(WorkerCutShort):
            await answer.chunk()


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/0.9 200 OK\r\n\r\nok",
        b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: 1\r\n b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_OVERHEAD + 1),
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_OVERHEAD // 25 + 1),
    ],
)
@scenario
async def test_heads_that_are_refused(answer: bytes) -> None:
    async with peer(replies(answer)) as worker, pool() as upstream:
        with pytest.raises(WorkerGarbage) as caught:
            await post(upstream, worker.origin)
        assert "127.0.0.1" not in caught.value.message
        assert upstream.stats().busy == upstream.stats().idle == 0
        await worker.wait_all_closed()


@pytest.mark.parametrize(
    "rest",
    [b"xyz\r\n", b"-1\r\n", b"2\r\nabc\r\n", b"fffffffffffffffff\r\n", b"0\r\n" + b"x: y\r\n" * MAX_OVERHEAD],
)
@scenario
async def test_framing_that_breaks_after_a_piece(rest: bytes) -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await go.wait()
        await connection.send(rest)
        await connection.wait_closed()

    go = asyncio.Event()
    async with peer(script) as worker, pool() as upstream:
        answer = await post(upstream, worker.origin)
        assert await answer.chunk() == b"one"
        go.set()
        with pytest.raises(WorkerGarbage):
            await answer.read(1 << 20)
        await worker.wait_all_closed()


VALID = {
    "fixed": (fixed(b"hello", fields=b"Content-Type: text/plain\r\n"), b"hello"),
    "chunked": (chunked(b"hel", b"lo", fields=b"x: y\r\n"), b"hello"),
    "extended": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nx-sum: 1\r\n\r\n",
        b"hello",
    ),
}


@pytest.mark.parametrize("kind", VALID)
@scenario
async def test_an_answer_split_at_every_byte(kind: str) -> None:
    whole, body = VALID[kind]

    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(*(whole[i : i + 1] for i in range(len(whole))))
        for cut in range(1, len(whole)):
            await connection.request()
            await connection.send(whole[:cut], whole[cut:])
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        for _ in range(len(whole)):
            assert await get(upstream, worker.origin) == (200, body)
        assert len(worker.connections) == 1


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("kind", VALID)
@scenario
async def test_a_connection_closed_at_every_byte(kind: str, is_reset: bool) -> None:
    """No prefix of an answer passes for an answer, and what is delivered is a prefix of the body."""
    whole, body = VALID[kind]
    size = 0

    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(whole[:size])
        if is_reset:
            connection.reset()

    async with peer(script) as worker, pool() as upstream:
        for size in range(len(whole)):  # noqa: B007 - the script reads it
            answer = await upstream.send(worker.origin, "POST", "/", b"", [])
            assert body.startswith(await pumped_before_the_cut(answer))
            assert upstream.stats().busy == upstream.stats().idle == 0


async def pumped_before_the_cut(answer: Answer) -> bytes:
    taken: list[bytes] = []
    with pytest.raises(WorkerCutShort):
        await answer.pump(lambda piece: not taken.append(piece))
    return b"".join(taken)


@settings(max_examples=60)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=5),
    cuts=st.sets(st.integers(min_value=1, max_value=300), max_size=12),
    is_chunked=st.booleans(),
)
def test_segmentation_changes_nothing(pieces: list[bytes], cuts: set[int], is_chunked: bool) -> None:
    whole = chunked(*pieces) if is_chunked else fixed(b"".join(pieces))
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    segments = [whole[start:end] for start, end in itertools.pairwise(edges)]

    async def exchange() -> None:
        async def script(connection: PeerConnection) -> None:
            for _ in range(2):
                await connection.request()
                await connection.send(*segments)
            await connection.wait_closed()

        async with peer(script) as worker, pool() as upstream:
            taken: list[bytes] = []
            answer = await post(upstream, worker.origin)
            await answer.pump(lambda piece: not taken.append(piece))
            assert b"".join(taken) == b"".join(pieces)
            assert await get(upstream, worker.origin) == (200, b"".join(pieces))
            assert upstream.stats().reuses == 1

    run_on(uvloop.new_event_loop, exchange())


# --- sending ------------------------------------------------------------------------------------


@scenario
async def test_the_request_as_written() -> None:
    heads: list[bytes] = []

    async def script(connection: PeerConnection) -> None:
        for _ in range(2):
            head, body = await connection.request()
            heads.append(head)
            await connection.send(fixed(body))
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        headers = header_block([(b"X-One", b"1"), (b"two", b"")])
        for body in ([], [b"ab", memoryview(b"cd")]):
            answer = await request(upstream, worker.origin, "POST", "/a?b", headers, body)
            assert await answer.read(4) == b"".join(body)
    host = b"host: 127.0.0.1:%d\r\n" % worker.origin.port
    start = b"POST /a?b HTTP/1.1\r\n" + host + b"X-One: 1\r\ntwo: \r\n"
    assert heads == [start + b"content-length: %d\r\n\r\n" % size for size in (0, 4)]


@pytest.mark.parametrize(
    ("method", "target"), [("POST", "/ HTTP/1.1\r\nevil: 1"), ("POST\n", "/"), ("POST\r", "/")]
)
@scenario
async def test_line_breaks_do_not_pass(method: str, target: str) -> None:
    async with pool() as upstream:
        with pytest.raises(ValueError, match="line break"):
            await upstream.send(Origin("127.0.0.1", 1), method, target, b"", [])


@scenario
async def test_many_targets_do_not_fill_memory() -> None:
    async with peer(replies(*[OK] * 200)) as worker, pool() as upstream:
        for number in range(200):
            answer = await request(upstream, worker.origin, "GET", f"/{number}", b"", [])
            assert await answer.read(2) == b"ok"
        [of_origin] = upstream._pools.values()
        assert len(of_origin._request_lines) <= 64


@scenario
async def test_a_large_body_waits_for_a_slow_worker() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await go.wait()
        rest = await connection.reader.readexactly(len(LARGE) + 4)
        await connection.send(fixed(rest[-4:]))
        await connection.wait_closed()

    go = asyncio.Event()
    async with peer(script) as worker, pool() as upstream:
        sending = asyncio.ensure_future(
            upstream.send(worker.origin, "POST", "/", b"", [memoryview(LARGE), b"tail"])
        )
        await asyncio.sleep(0.05)
        assert not sending.done()
        go.set()
        answer = await sending
        assert await answer.read(10) == b"tail"
        assert upstream.stats().idle == 1


@scenario
async def test_an_early_answer_ends_an_upload() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await connection.send(fixed(b"too large", b"413 Payload Too Large"))
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        answer = await upstream.send(worker.origin, "POST", "/", b"", [LARGE])
        await answer.head()
        assert (answer.status, await answer.read(100)) == (413, b"too large")
        stats = upstream.stats()
        assert (stats.idle, stats.busy) == (0, 0)
        await worker.wait_all_closed()


@scenario
async def test_an_upload_that_the_worker_cuts() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        connection.reset()

    async with peer(script) as worker, pool() as upstream:
        answer = await upstream.send(worker.origin, "POST", "/", b"", [LARGE])
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert upstream.stats().busy == 0


# --- the one retry ------------------------------------------------------------------------------


def dying(before: int, *, last: bytes = b"", is_reset: bool = False) -> Callable[[PeerConnection], object]:
    """Each connection answers `before` requests and then closes upon the next, after `last`."""

    async def script(connection: PeerConnection) -> None:
        for _ in range(before):
            await connection.request()
            await connection.send(OK)
        await connection.head()
        await connection.send(last)
        if is_reset:
            connection.reset()

    return script


@pytest.mark.parametrize("is_reset", [False, True])
@scenario
async def test_a_reused_connection_found_closed_is_replaced(is_reset: bool) -> None:
    async with peer(dying(2, is_reset=is_reset)) as worker, pool() as upstream:
        for _ in range(6):
            assert await get(upstream, worker.origin) == (200, b"ok")
        stats = upstream.stats()
        assert (stats.connects, stats.retries) == (3, 2)


@scenario
async def test_the_replacement_gets_all_of_a_large_body() -> None:
    seen: list[int] = []

    async def script(connection: PeerConnection) -> None:
        if len(worker.connections) == 1:
            await dying(1)(connection)
            return
        seen.append(len((await connection.request())[1]))
        await connection.send(OK)
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        assert await get(upstream, worker.origin, LARGE) == (200, b"ok")
        assert seen == [len(LARGE)]


@scenario
async def test_it_is_replaced_only_once() -> None:
    async def script(connection: PeerConnection) -> None:
        await dying(1 if connection is worker.connections[0] else 0)(connection)

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        with pytest.raises(WorkerCutShort):
            await get(upstream, worker.origin)
        assert len(worker.connections) == 2


@scenario
async def test_a_fresh_connection_is_not_replaced() -> None:
    async with peer(dying(0)) as worker, pool() as upstream:
        with pytest.raises(WorkerCutShort):
            await get(upstream, worker.origin)
        assert len(worker.connections) == 1


@pytest.mark.parametrize("last", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
@scenario
async def test_not_after_the_first_byte_of_an_answer(last: bytes) -> None:
    async with peer(dying(1, last=last)) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        with pytest.raises(WorkerCutShort):
            await get(upstream, worker.origin)
        assert len(worker.connections) == 1


@scenario
async def test_a_replacement_that_is_refused_counts_as_cut_short() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(OK)
        await connection.request()
        await worker.stop_listening()

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        with pytest.raises(WorkerCutShort) as caught:
            await get(upstream, worker.origin)
        assert isinstance(caught.value.__cause__, WorkerUnreachable)


@scenario
async def test_an_answer_given_up_is_not_sent_again() -> None:
    async with peer(dying(1)) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        answer = await upstream.send(worker.origin, "POST", "/", b"", [])
        answer.abort()
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert len(worker.connections) == 1


@scenario
async def test_an_answer_whose_client_has_left_is_not_asked_for_again() -> None:
    """A server that hears of the leaving closes without a byte, as one does whose connection was idle."""
    async with peer(dying(1)) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        answer = await upstream.send(worker.origin, "POST", "/", b"", [])
        answer.leave()
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert len(worker.connections) == 1


@scenario
async def test_nor_if_the_connection_was_lost_before_the_client_has_left() -> None:
    async with peer(dying(1)) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        answer = await upstream.send(worker.origin, "POST", "/", b"", [])
        await until(lambda: upstream.stats().busy == 0)
        answer.leave()
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert len(worker.connections) == 1


# --- many at once -------------------------------------------------------------------------------


@scenario
async def test_nothing_leaks_when_legs_are_given_up_at_any_moment() -> None:
    async def script(connection: PeerConnection) -> None:
        while True:
            _, body = await connection.request()
            await connection.send(*(chunked(body, body)[i : i + 40] for i in range(0, 200, 40)))

    async def leg(upstream: PooledUpstream, origin: Origin, number: int) -> None:
        task = asyncio.ensure_future(get(upstream, origin, b"%032d" % number))
        for _ in range(number % 50):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == (200, b"%032d" % number * 2)

    async with peer(script) as worker, pool() as upstream:
        await asyncio.gather(*(leg(upstream, worker.origin, number) for number in range(300)))
        assert upstream.stats().busy == 0
        assert await get(upstream, worker.origin, b"after") == (200, b"afterafter")
        await until(lambda: upstream.stats().idle == sum(not c.over.is_set() for c in worker.connections))


# --- connecting ---------------------------------------------------------------------------------


def without_address(error: WorkerError) -> bool:
    return "127.0.0.1" not in error.message and "localhost" not in error.message


async def silent(connection: PeerConnection) -> None:
    await connection.wait_closed()


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
@scenario
async def test_a_host_that_cannot_be_a_name(host: str) -> None:
    async with pool() as upstream:
        with pytest.raises(WorkerUnreachable) as caught:
            await post(upstream, Origin(host, 80))
        assert host not in caught.value.message


@scenario
async def test_connecting_has_a_limit() -> None:
    """A peer that accepts but never answers the TLS greeting."""
    async with peer(silent) as worker, pool(connect_timeout_s=0.05) as upstream:
        with pytest.raises(WorkerUnreachable) as caught:
            await post(upstream, Origin("127.0.0.1", worker.origin.port, client_context()))
        assert without_address(caught.value)
        await worker.wait_all_closed()


@scenario
async def test_cancelled_while_connecting() -> None:
    async with peer(silent) as worker, pool() as upstream:
        task = asyncio.ensure_future(
            post(upstream, Origin("127.0.0.1", worker.origin.port, client_context()))
        )
        await until(lambda: bool(worker.connections))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.wait_all_closed()
        assert upstream.stats().busy == 0


@scenario
async def test_cancelled_while_uploading() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        has_begun.set()
        await is_cancelled.wait()
        await connection.wait_closed()

    has_begun, is_cancelled = asyncio.Event(), asyncio.Event()
    async with peer(script) as worker, pool() as upstream:
        task = asyncio.ensure_future(upstream.send(worker.origin, "POST", "/", b"", [LARGE]))
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        is_cancelled.set()
        await worker.wait_all_closed()
        assert upstream.stats().busy == 0


@scenario
async def test_cancelled_while_sending_again() -> None:
    async def script(connection: PeerConnection) -> None:
        if connection is worker.connections[0]:
            await dying(1)(connection)
        else:
            await silent(connection)

    async with peer(script) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        task = asyncio.ensure_future(post(upstream, worker.origin))
        await until(lambda: len(worker.connections) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.wait_all_closed()
        assert upstream.stats().busy == 0


@scenario
async def test_a_pool_that_closes_while_connecting() -> None:
    async with peer(silent) as worker, pool() as upstream:
        task = asyncio.ensure_future(post(upstream, worker.origin))
        await asyncio.sleep(0)
        await upstream.aclose()
        with pytest.raises((WorkerUnreachable, WorkerCutShort)):
            await task
        await worker.wait_all_closed()


@scenario
async def test_tls() -> None:
    async with (
        peer(replies(OK, chunked(b"a", b"b")), tls=server_context(), client_tls=client_context()) as worker,
        pool() as upstream,
    ):
        assert await get(upstream, worker.origin, bytes(100_000)) == (200, b"ok")
        assert await get(upstream, worker.origin) == (200, b"ab")
        assert upstream.stats().reuses == 1


@scenario
async def test_a_large_body_over_tls() -> None:
    async with (
        peer(replies(OK), tls=server_context(), client_tls=client_context()) as worker,
        pool() as upstream,
    ):
        assert await get(upstream, worker.origin, bytes(20_000_000)) == (200, b"ok")
        assert upstream.stats().idle == 1


@scenario
async def test_tls_that_cannot_be_trusted() -> None:
    async with (
        peer(silent, tls=server_context(), client_tls=ssl.create_default_context()) as worker,
        pool() as upstream,
    ):
        with pytest.raises(WorkerUnreachable) as caught:
            await post(upstream, worker.origin)
        assert without_address(caught.value)
        assert upstream.stats().busy == 0


@scenario
async def test_a_tls_stream_without_its_goodbye_is_cut_short() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\n", b"half")
        await go.wait()
        connection.cut()

    go = asyncio.Event()
    async with peer(script, tls=server_context(), client_tls=client_context()) as worker, pool() as upstream:
        answer = await post(upstream, worker.origin)
        assert await answer.chunk() == b"half"
        go.set()
        with pytest.raises(WorkerCutShort):
            await answer.chunk()


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("size", [100, 1_000_000])
@scenario
async def test_what_is_sent_and_dropped_arrives(is_tls: bool, size: int) -> None:
    """The hand-off's decode leg must reach its worker even if its client has left."""
    bodies: list[bytes] = []

    async def script(connection: PeerConnection) -> None:
        bodies.append((await connection.request())[1])
        await connection.wait_closed()

    contexts = (server_context(), client_context()) if is_tls else (None, None)
    async with peer(script, "127.0.0.1", *contexts) as worker, pool() as upstream:
        answer = await upstream.send(worker.origin, "POST", "/", b"", [bytes(size)])
        answer.abort()
        await until(lambda: bool(bodies))
        assert len(bodies[0]) == size
        await worker.wait_all_closed()


@pytest.fixture
def loopback() -> str:
    """The IPv6 loopback address, or the IPv4 one on a machine that has none."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return "::1"
    except OSError:
        return "127.0.0.1"


@scenario
async def test_ipv6(loopback: str) -> None:
    heads: list[bytes] = []

    async def script(connection: PeerConnection) -> None:
        heads.append((await connection.request())[0])
        await connection.send(OK)
        await connection.wait_closed()

    async with peer(script, loopback) as worker, pool() as upstream:
        assert await get(upstream, worker.origin) == (200, b"ok")
    host = f"[{loopback}]" if ":" in loopback else loopback
    assert f"host: {host}:{worker.origin.port}\r\n".encode() in heads[0]


@scenario
async def test_connections_do_not_wait_to_fill_packets() -> None:
    async with peer(replies(OK)) as worker, pool() as upstream:
        await get(upstream, worker.origin)
        [connection] = upstream._connections
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@scenario
async def test_they_describe_themselves() -> None:
    async with peer(replies(OK)) as worker, pool() as upstream:
        answer = await post(upstream, worker.origin)
        assert "200 complete, 2 bytes unread" in repr(answer)
        assert "idle=1" in repr(upstream)
        assert "idle, 1 legs" in repr(next(iter(upstream._connections)))


def test_a_pool_that_was_never_used_closes() -> None:
    asyncio.run(PooledUpstream().aclose())


@pytest.mark.parametrize("protocol", [b"RTSP/1.0", b"RTSP/1.1", b"ICE/1.0"])
@scenario
async def test_what_speaks_another_protocol_is_no_worker(protocol: bytes) -> None:
    async with peer(replies(OK.replace(b"HTTP/1.1", protocol))) as worker, pool() as upstream:
        with pytest.raises(WorkerGarbage):
            await get(upstream, worker.origin)
