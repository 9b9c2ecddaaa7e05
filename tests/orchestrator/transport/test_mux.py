"""Many legs on one connection: how it is opened, shared and given up, and what a worker may not do."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from orchestrator.errors import WorkerCutShort, WorkerGarbage, WorkerUnreachable
from orchestrator.transport import mux as module
from orchestrator.transport.base import Answer, Origin, Upstream
from orchestrator.transport.mux import MuxUpstream, upstream
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.headers import header_block
from orchestrator.wire.info import Streams
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
    U32,
    WINDOW,
    FrameError,
    credit,
    frame,
    reset,
)
from tests.orchestrator.transport.harness import (
    PeerConnection,
    Script,
    client_context,
    fixed,
    peer,
    replies,
    scenario,
    server_context,
    turns,
    until,
)
from tests.orchestrator.transport.streams import (
    SWITCHED,
    Frame,
    Framed,
    FramedScript,
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
        pieces = [body[at : at + MAX_PAYLOAD] for at in range(0, len(body), MAX_PAYLOAD)]
        data = (frame(DATA, stream, piece) for piece in pieces)
        framed.write(b"".join((head_frame(stream), *data, frame(DATA | END, stream))))


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
@scenario
async def test_a_worker_that_refuses_gets_http_until_it_is_offered_anew(
    refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = True

    async def script(connection: PeerConnection) -> None:
        if not (await connection.peek_head()).startswith(b"GET /v1/baton/streams"):
            await replies(fixed(b"plain"), fixed(b"plain"))(connection)
        elif refusing:
            await connection.head()
            await connection.send(REFUSALS[refusal])
            await connection.wait_closed()
        else:
            framed = Framed(connection)
            await framed.upgrade()
            await echo(framed)

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        for _ in range(2):
            assert await get(upstream, worker.origin) == (200, b"plain")
        assert len(worker.connections) == 2  # it was asked once
        assert caplog.text.count("its legs go by HTTP") == 1
        refusing = False
        upstream.offer(worker.origin, True)
        assert await get(upstream, worker.origin) == (200, b"{}")


@pytest.mark.pure  # a constant is replaced
@scenario
async def test_a_worker_that_has_refused_is_asked_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_REFUSED_S", -1.0)

    async def script(connection: PeerConnection) -> None:
        while True:
            await connection.head()
            await connection.send(REFUSALS["not found"])

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        peer_ = upstream._peers[worker.origin]
        for asked in range(1, 4):
            answer = await upstream.send(worker.origin, "GET", "/", b"", [])
            assert await answer.read(100) == b""
            await until(lambda: peer_.opening is None)
            assert upstream.stats().reuses == asked - 1  # of the pool's connection
            assert len(worker.connections) == 1 + asked
            assert peer_._pause_s == -(2.0**asked)  # less and less often


@pytest.mark.pure  # a constant is replaced
@scenario
async def test_nobody_waits_for_a_worker_that_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFUSED_S", -1.0)
    upgrades = 0
    let_go = asyncio.Event()

    async def script(connection: PeerConnection) -> None:
        nonlocal upgrades
        if not (await connection.peek_head()).startswith(b"GET /v1/baton/streams"):
            await replies(fixed(b"plain"), fixed(b"plain"))(connection)
            return
        upgrades += 1
        if upgrades == 1:
            await connection.head()
            await connection.send(REFUSALS["not found"])
            return
        await let_go.wait()
        framed = Framed(connection)
        await framed.upgrade()
        await echo(framed)

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        peer_ = upstream._peers[worker.origin]
        assert await get(upstream, worker.origin) == (200, b"plain")
        assert await get(upstream, worker.origin) == (200, b"plain")  # though it is asked meanwhile
        assert peer_.opening is not None
        let_go.set()
        await until(lambda: peer_.connection is not None)
        assert await get(upstream, worker.origin) == (200, b"{}")
        assert (upgrades, peer_.has_refused) == (2, False)


@pytest.mark.parametrize(
    ("silence", "says"), [(True, "did not answer in time to"), (False, "closed the connection on")]
)
@scenario
async def test_an_upgrade_that_something_on_the_way_does_not_know_is_refused(
    silence: bool, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(connection: PeerConnection) -> None:
        if not (await connection.peek_head()).startswith(b"GET /v1/baton/streams"):
            await replies(fixed(b"plain"), fixed(b"plain"))(connection)
        elif silence:
            await connection.head()
            await connection.send(SWITCHED[:20])
            await connection.wait_closed()

    async with peer(script) as worker:
        upstream = MuxUpstream(PooledUpstream(connect_timeout_s=0.2))
        upstream.offer(worker.origin, True)
        for _ in range(2):
            assert await get(upstream, worker.origin) == (200, b"plain")
        assert len(worker.connections) == 2
        assert f"{says} the upgrade to baton-streams/1: its legs go by HTTP" in caplog.text
        await upstream.aclose()


@scenario
async def test_nobody_listens() -> None:
    async with mux() as upstream:
        nowhere = Origin("127.0.0.1", 1)
        upstream.offer(nowhere, True)
        found = await asyncio.gather(*(post(upstream, nowhere) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [WorkerUnreachable] * 3


@scenario
async def test_closing_ends_those_who_wait_for_a_connection() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.wait_closed()

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        waiting = [asyncio.create_task(post(upstream, worker.origin)) for _ in range(2)]
        await until(lambda: bool(worker.connections))
        await upstream.aclose()
        for task in waiting:
            with pytest.raises(WorkerUnreachable, match="stopping"):
                await task


@scenario
async def test_tls() -> None:
    async def script(connection: PeerConnection) -> None:
        framed = Framed(connection)
        await framed.upgrade()
        await echo(framed)

    async with peer(script, tls=server_context(), client_tls=client_context()) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        large = bytes(WINDOW)
        assert await get(upstream, worker.origin, large) == (200, large)
        assert await get(upstream, worker.origin) == (200, b"{}")
        assert upstream.stats().connects == 1


def test_the_environment_chooses() -> None:
    async def made(streams: Streams) -> Upstream:
        return upstream(streams, connect_timeout_s=5)

    assert isinstance(asyncio.run(made("http")), PooledUpstream)
    assert isinstance(asyncio.run(made("mux")), MuxUpstream)


# --- what goes by HTTP all the same ---------------------------------------------------------------


def both(script: FramedScript, *answers: bytes) -> Script:
    """A worker's connection, whatever it is opened for."""

    async def serve(connection: PeerConnection) -> None:
        if (await connection.peek_head()).startswith(b"GET /v1/baton/streams"):
            framed = Framed(connection)
            await framed.upgrade()
            await script(framed)
        else:
            await replies(*answers)(connection)

    return serve


@pytest.mark.pure  # a constant is replaced
@scenario
async def test_a_head_that_fits_into_no_frame_goes_by_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAYLOAD", 1000)
    async with peer(both(echo, fixed(b"plain"))) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        for target, expected in (("/", b"{}"), ("/" + "t" * 1000, b"plain")):
            answer = await upstream.send(worker.origin, "POST", target, b"", [b"{}"])
            assert await answer.read(100) == expected


@pytest.mark.pure  # a constant is replaced
@scenario
async def test_beyond_the_streams_of_a_connection_it_goes_by_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STREAMS", 2)
    async with peer(both(silent, fixed(b"plain"))) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        open_ = [await upstream.send(worker.origin, "POST", "/", b"", [b"{}"]) for _ in range(2)]
        assert await get(upstream, worker.origin) == (200, b"plain")
        for answer in open_:
            answer.abort()


async def silent(framed: Framed) -> None:
    await framed.connection.wait_closed()


@scenario
async def test_a_worker_that_is_offered_no_more_keeps_what_is_under_way() -> None:
    served: asyncio.Future[tuple[Framed, int]] = asyncio.get_running_loop().create_future()

    async def script(framed: Framed) -> None:
        stream, _, _ = await framed.request()
        served.set_result((framed, stream))
        await framed.connection.wait_closed()

    async with peer(both(script, fixed(b"plain"))) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        answer = await upstream.send(worker.origin, "POST", "/", b"", [b"{}"])
        framed, stream = await served
        upstream.offer(worker.origin, False)
        assert await get(upstream, worker.origin) == (200, b"plain")
        framed.write(answer_frames(stream, b"late"))
        assert await answer.read(100) == b"late"
        await worker.connections[0].over.wait()


# --- streams --------------------------------------------------------------------------------------


class Streaming:
    """A worker that takes one connection, and does with it as a test says."""

    def __init__(self) -> None:
        self.framed: list[Framed] = []

    async def __call__(self, framed: Framed) -> None:
        self.framed.append(framed)
        await asyncio.Event().wait()

    async def begun(self, upstream: MuxUpstream, origin: Origin) -> tuple[Framed, int, Answer]:
        """A stream whose head has come."""
        answer = await upstream.send(origin, "POST", "/v1/x", b"", [b"{}"])
        await until(lambda: len(self.framed) == upstream.stats().connects)
        framed = self.framed[-1]
        stream, _, _ = await framed.request()
        framed.write(head_frame(stream))
        await answer.head()
        return framed, stream, answer


@scenario
async def test_frames_come_in_any_pieces() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        data = frame(DATA, stream, b"abc") + frame(DATA | END, stream, b"def")
        for at in range(len(data)):
            await framed.send(data[at : at + 1])
        assert await answer.read(100) == b"abcdef"


@scenario
async def test_what_a_read_brings_of_a_stream_comes_as_one() -> None:
    worker, taken = Streaming(), []

    def sink(piece: bytes) -> bool:
        taken.append(piece)
        return True

    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        _, other, other_answer = await worker.begun(upstream, origin)
        pumping = asyncio.ensure_future(answer.pump(sink))
        await turns()
        pieces = (frame(DATA, number, b"%d" % step) for step in range(3) for number in (stream, other))
        framed.write(b"".join((*pieces, frame(DATA | END, stream))))
        await pumping
        assert taken == [b"012"]
        assert await other_answer.chunk() == b"012"
        assert (answer.arrivals, other_answer.arrivals) == (2, 2)  # with the heads
        other_answer.abort()


@scenario
async def test_a_sink_may_abort_others_of_the_same_read() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, first, first_answer = await worker.begun(upstream, origin)
        others = [await worker.begun(upstream, origin) for _ in range(2)]

        def sink(piece: bytes) -> bool:
            for _, _, other in others:
                other.abort()
            return True

        pumping = asyncio.ensure_future(first_answer.pump(sink))
        await turns()
        (_, second, _), (_, third, _) = others
        data = (frame(DATA, first, b"a"), frame(DATA, second, b"b"), frame(DATA | END, third, b"c"))
        framed.write(b"".join((*data, frame(DATA | END, first))))
        await pumping
        for _, _, other in others:
            assert (other.unread, other.is_complete) == (0, False)
            with pytest.raises(WorkerCutShort):
                await other.chunk()
        await until(lambda: upstream.stats().busy == 0)


@pytest.mark.parametrize("last", [reset(1, RESET_BROKEN), frame(DATA, 9)])
@scenario
async def test_what_comes_before_the_fault_in_the_same_read_is_delivered(last: bytes) -> None:
    async def script(framed: Framed) -> None:
        await framed.request()
        await framed.send(head_frame(1, 201) + frame(DATA, 1, b"half") + last)
        await framed.connection.wait_closed()

    async with streams(script) as (upstream, origin):
        answer = await post(upstream, origin)
        assert (answer.status, await answer.chunk()) == (201, b"half")
        with pytest.raises(WorkerCutShort):
            await answer.chunk()


@scenario
async def test_what_comes_behind_the_upgrade_in_one_read_is_frames_already() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await connection.send(SWITCHED + frame(PING, 0, b"12345678"))
        framed = Framed(connection)
        assert (await framed.next())[:2] == (PING, True)
        await echo(framed)

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        assert await get(upstream, worker.origin) == (200, b"{}")


@scenario
async def test_who_leaves_and_who_gives_up_tell_the_worker() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        answer.leave()
        assert await framed.next() == (LEAVE, False, stream, b"")
        answer.abort()
        assert await framed.next() == (RESET, False, stream, bytes([RESET_CANCELLED]))
        late = (frame(DATA, stream, b"late"), credit(stream, 5), reset(stream, RESET_BROKEN))
        await framed.send(*late, frame(DATA | END, stream, b""))  # they have crossed the reset
        assert upstream.stats() == (1, 0, 1, 0, 0)


@scenario
async def test_an_answer_without_a_body() -> None:
    async def script(framed: Framed) -> None:
        stream, _, _ = await framed.request()
        framed.write(head_frame(stream, is_end=True))
        for status in (204, 304):
            stream, _, _ = await framed.request()
            framed.write(answer_frames(stream, b"not for you", status))
        await framed.connection.wait_closed()

    async with streams(script) as (upstream, origin):
        assert [await get(upstream, origin) for _ in range(3)] == [(200, b""), (204, b""), (304, b"")]


@scenario
async def test_an_answer_that_the_application_broke_off() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        other_framed, other, other_answer = await worker.begun(upstream, origin)
        await framed.send(frame(DATA, stream, b"half"), reset(stream, RESET_BROKEN))
        assert await answer.chunk() == b"half"
        with pytest.raises(WorkerCutShort, match="before the end of its answer"):
            await answer.chunk()
        await other_framed.send(frame(DATA | END, other, b"whole"))  # nothing happened to it
        assert await other_answer.read(100) == b"whole"


@scenario
async def test_a_lost_connection_cuts_all_its_streams() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        begun = [await worker.begun(upstream, origin) for _ in range(3)]
        begun[0][0].connection.cut()
        errors = []
        for _, _, answer in begun:
            with pytest.raises(WorkerCutShort) as caught:
                await answer.read(100)
            errors.append(caught.value)
        assert len({id(error) for error in errors}) == 3  # each raises its own
        await worker.begun(upstream, origin)
        assert upstream.stats().connects == 2


# --- what is sent once more -----------------------------------------------------------------------


def refusing(times: int) -> FramedScript:
    """A worker that refuses the streams of its first connections."""
    connections = 0

    async def script(framed: Framed) -> None:
        nonlocal connections
        connections += 1
        if connections > times:
            await echo(framed)
        stream, _, _ = await framed.request()
        await framed.send(frame(LAST, 0), reset(stream, RESET_REFUSED))
        await framed.connection.wait_closed()

    return script


@scenario
async def test_a_refused_request_is_sent_once_more() -> None:
    async with streams(refusing(1)) as (upstream, origin):
        assert await get(upstream, origin, b"body") == (200, b"body")
        assert upstream.stats().retries == 1


@scenario
async def test_a_request_that_is_refused_twice_is_cut_short() -> None:
    async with streams(refusing(2)) as (upstream, origin):
        with pytest.raises(WorkerCutShort):
            await get(upstream, origin)


@scenario
async def test_a_connection_that_was_closed_when_the_request_came_is_replaced() -> None:
    async def script(framed: Framed) -> None:
        stream, _, body = await framed.request()
        await framed.send(answer_frames(stream, body))
        await framed.request()  # and goes

    async with streams(script) as (upstream, origin):
        assert await get(upstream, origin, b"one") == (200, b"one")
        assert await get(upstream, origin, b"two") == (200, b"two")
        assert upstream.stats()[2:] == (2, 1, 1)


@scenario
async def test_a_fresh_connection_that_is_closed_is_not_replaced() -> None:
    async def script(framed: Framed) -> None:
        await framed.request()

    async with streams(script) as (upstream, origin):
        with pytest.raises(WorkerCutShort, match="before its answer"):
            await post(upstream, origin)
        assert upstream.stats().retries == 0


@scenario
async def test_a_request_that_no_fresh_connection_can_take_counts_as_seen_by_the_worker() -> None:
    """What has ended with it may be what it did to the worker: a request that kills must not count as one
    that has reached nobody.
    """
    connections = 0

    async def script(connection: PeerConnection) -> None:
        nonlocal connections
        connections += 1
        framed = Framed(connection)
        if connections == 1:
            await framed.upgrade()
            stream, _, body = await framed.request()
            await framed.send(answer_frames(stream, body))
            await framed.request()
        # as one that is ending: what it had accepted is closed

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        assert await get(upstream, worker.origin, b"one") == (200, b"one")
        with pytest.raises(WorkerCutShort):
            await get(upstream, worker.origin, b"two")
        assert connections == 2


@scenario
async def test_a_request_that_was_left_is_not_sent_again() -> None:
    async def script(framed: Framed) -> None:
        stream, _, body = await framed.request()
        await framed.send(answer_frames(stream, body))
        await framed.until(LEAVE)

    async with streams(script) as (upstream, origin):
        assert await get(upstream, origin) == (200, b"{}")
        answer = await upstream.send(origin, "POST", "/", b"", [b"{}"])
        answer.leave()
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert upstream.stats().connects == 1


@scenario
async def test_a_request_that_is_to_be_sent_again_and_is_left_is_not_sent() -> None:
    async with streams(refusing(1)) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [b"{}"])
        await until(lambda: answer._is_stale)
        answer.leave()
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert upstream.stats().connects == 1


@scenario
async def test_a_request_that_is_refused_after_it_was_left_is_not_sent_again() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [b"{}"])
        await until(lambda: bool(worker.framed))
        answer.leave()
        await worker.framed[0].send(frame(LAST, 0), reset(1, RESET_REFUSED))
        with pytest.raises(WorkerCutShort):
            await answer.head()
        assert upstream.stats().connects == 1


@scenario
async def test_a_request_that_is_to_be_sent_again_may_be_given_up_first() -> None:
    async with streams(refusing(1)) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [b"{}"])
        await until(lambda: answer._is_stale)
        answer.abort()
        with pytest.raises(WorkerCutShort):
            await answer.head()


# --- credit and turns -----------------------------------------------------------------------------


@scenario
async def test_a_large_body_waits_for_credit() -> None:
    async def script(framed: Framed) -> None:
        await framed.until(OPEN)
        taken = 0
        while taken < len(LARGE):
            window = taken + WINDOW
            while taken < window:
                taken += len((await framed.until(BODY)).payload)
            sizes.append(taken)
            await turns(20)
            framed.write(credit(1, WINDOW))
        framed.write(answer_frames(1, b"taken"))
        await framed.connection.wait_closed()

    sizes: list[int] = []
    async with streams(script) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [LARGE])
        assert answer.is_sent  # it returns when all is written
        assert await answer.read(100) == b"taken"
        assert sizes == [WINDOW, 2 * WINDOW, 3 * WINDOW, 4 * WINDOW]


@scenario
async def test_a_body_in_parts_arrives_as_it_is() -> None:
    parts = [b"", b"a" * 10, bytearray(b"b" * 100_000), memoryview(b"c" * 70_000), b"", b"d"]
    async with streams(echo) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", parts)
        assert await answer.read(1 << 20) == b"".join(parts)


@pytest.mark.pure  # a constant is replaced
@scenario
async def test_large_bodies_take_turns_and_small_requests_pass_them(monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytes(16 << 20)
    monkeypatch.setattr(module, "WINDOW", len(body))

    async def script(framed: Framed) -> None:
        await may_read.wait()
        while order.count(END) < 3:
            found = await framed.until(OPEN, BODY)
            order.append(found.stream)
            if found.is_end:
                order.append(END)
                framed.write(answer_frames(found.stream, b"taken"))
        await framed.connection.wait_closed()

    order: list[int] = []
    may_read = asyncio.Event()
    async with streams(script) as (upstream, origin):
        large = [asyncio.create_task(post(upstream, origin, body)) for _ in range(2)]
        await until(lambda: upstream.stats().busy == 1)
        [connection] = upstream._connections
        await until(lambda: connection._last == 2)  # streams were opened, and the socket is full
        small = asyncio.create_task(post(upstream, origin))
        await until(lambda: connection._last == 3)
        may_read.set()
        for task in (small, *large):
            assert await (await task).read(100) == b"taken"
    # The small one is whole before either large one, whose frames alternate from then on.
    assert order.index(END) == order.index(3) + 2
    rest = order[order.index(END) + 1 :]
    both_under_way = rest[: rest.index(END)]
    longest = max(len(list(run)) for _, run in itertools.groupby(both_under_way))
    assert set(both_under_way) == {1, 2}
    assert longest <= 2


@scenario
async def test_an_answer_that_comes_before_the_body_is_whole_ends_it() -> None:
    async def script(framed: Framed) -> None:
        stream = (await framed.until(OPEN)).stream
        framed.write(answer_frames(stream, b"no more", 413))
        assert await framed.until(RESET) == (RESET, False, stream, bytes([RESET_CANCELLED]))
        await echo(framed)

    async with streams(script) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [LARGE])
        assert (await answer.read(100), answer.status) == (b"no more", 413)
        assert await get(upstream, origin) == (200, b"{}")


@scenario
async def test_a_sender_that_is_cancelled_resets_its_stream() -> None:
    async def script(framed: Framed) -> None:
        stream = (await framed.until(OPEN)).stream
        opened.set()
        assert (await framed.until(RESET)).stream == stream
        await echo(framed)

    opened = asyncio.Event()
    async with streams(script) as (upstream, origin):
        sending = asyncio.create_task(post(upstream, origin, LARGE))
        await opened.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert await get(upstream, origin) == (200, b"{}")


@scenario
async def test_a_stream_that_is_not_read_gets_no_credit_and_holds_up_nobody() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, slow, slow_answer = await worker.begun(upstream, origin)
        for _ in range(WINDOW // MAX_PAYLOAD):
            framed.write(frame(DATA, slow, bytes(MAX_PAYLOAD)))
        _, fast, fast_answer = await worker.begun(upstream, origin)
        framed.write(frame(DATA | END, fast, b"fast"))
        assert await fast_answer.read(100) == b"fast"
        assert slow_answer.unread == WINDOW
        assert len(await slow_answer.chunk()) == WINDOW
        given = 0
        while given < WINDOW:
            given += U32.unpack((await framed.until(CREDIT)).payload)[0]
        assert given == WINDOW
        slow_answer.abort()


@scenario
async def test_a_small_answer_costs_no_credit() -> None:
    async def script(framed: Framed) -> None:
        stream, _, _ = await framed.request()
        framed.write(answer_frames(stream, bytes(MAX_PAYLOAD)))
        seen.append(await framed.next())

    seen: list[Frame] = []
    async with streams(script) as (upstream, origin):
        assert (await get(upstream, origin))[0] == 200
        await upstream.send(origin, "GET", "/", b"", [])
        await until(lambda: bool(seen))
        assert seen[0].kind == OPEN


@scenario
async def test_single_bytes_that_nobody_reads_take_little() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        framed.write(frame(DATA, stream, b"a") * 100_000)
        await until(lambda: answer.unread == 100_000)
        assert len(answer._pieces) <= 1025
        assert await answer.chunk() == b"a" * 100_000
        answer.abort()


# --- pings ----------------------------------------------------------------------------------------


@scenario
async def test_a_worker_is_pinged_when_it_says_nothing_and_lives_if_it_answers() -> None:
    async def script(framed: Framed) -> None:
        stream, _, _ = await framed.request()
        for _ in range(5):
            ping = await framed.until(PING)
            framed.write(frame(PING | END, 0, ping.payload))
        framed.write(answer_frames(stream, b"late"))
        await framed.connection.wait_closed()

    async with streams(script, ping_s=0.02) as (upstream, origin):
        assert await get(upstream, origin) == (200, b"late")


@scenario
async def test_a_worker_that_answers_no_ping_is_cut_off() -> None:
    async with streams(silent, ping_s=0.02) as (upstream, origin):
        answers = [await upstream.send(origin, "POST", "/", b"", [b"{}"]) for _ in range(3)]
        for answer in answers:
            with pytest.raises(WorkerCutShort, match="for too long"):
                await answer.head()
        assert upstream.stats().busy == 0


@scenario
async def test_a_connection_without_streams_is_closed_after_a_while() -> None:
    async with peer(both(answer_pings)) as worker, mux(ping_s=0.02, idle_limit_s=0.1) as upstream:
        upstream.offer(worker.origin, True)
        assert await get(upstream, worker.origin) == (200, b"{}")
        await worker.wait_all_closed()
        assert await get(upstream, worker.origin) == (200, b"{}")
        assert upstream.stats().connects == 2


async def answer_pings(framed: Framed) -> None:
    while True:
        found = await framed.until(OPEN, BODY, PING)
        if found.kind == PING:
            framed.write(frame(PING | END, 0, found.payload))
        elif found.is_end:
            framed.write(answer_frames(found.stream, found.payload))


@scenario
async def test_pings_of_a_worker_are_answered() -> None:
    async def script(framed: Framed) -> None:
        framed.write(frame(PING, 0, b"12345678"))
        answers.append(await framed.until(PING))
        framed.write(answer_frames(1, b"{}"))
        await framed.connection.wait_closed()

    answers: list[Frame] = []
    async with streams(script) as (upstream, origin):
        assert await get(upstream, origin) == (200, b"{}")
        assert answers == [(PING, True, 0, b"12345678")]


@scenario
async def test_a_worker_that_pings_and_does_not_read_is_answered_within_bounds() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        [connection] = upstream._connections
        flood = frame(PING, 0, b"12345678") * 10_000
        for number in range(100):
            framed.write(flood + frame(DATA, stream, b"%d" % number))
            await answer.chunk()
        assert connection._transport.get_write_buffer_size() < WINDOW
        answer.abort()


# --- what a worker may not do ---------------------------------------------------------------------


# What can be laid to one stream; the others of its connection are cut short, and have done nothing wrong.
OF_A_STREAM = {
    "OPEN": frame(OPEN, 1, b"GET /\r\n"),
    "BODY": frame(BODY, 1, b"x"),
    "LEAVE": frame(LEAVE, 1),
    "a ping of a stream": frame(PING, 1, b"12345678"),
    "LAST of a stream": frame(LAST, 1),
    "data before the head": frame(DATA, 1, b"x"),
    "two heads": head_frame(1) + head_frame(1),
    "half a status": frame(HEAD, 1, b"\1"),
    "no status": frame(HEAD, 1),
    "status 0": head_frame(1, 0),
    "status 101": head_frame(1, 101),
    "status 1000": head_frame(1, 1000),
    "a field without a colon": head_frame(1, 200, b"x\r\n"),
    "a line break in a value": head_frame(1, 200, b"x: a\nb\r\n"),
    "NUL in a value": head_frame(1, 200, b"x: \0\r\n"),
    "a head that does not end": head_frame(1, 200, b"x: y"),
    "too many fields": head_frame(1, 200, b"a: b\r\n" * 5000),
    "data beyond the credit": head_frame(1) + frame(DATA, 1, bytes(MAX_PAYLOAD)) * 5,
    "too much credit": credit(1, MAX_CREDIT),
    "too much credit in sum": credit(1, 2**30) * 2,
    "a reset that is ours": reset(1, RESET_CANCELLED),
    "a reset of an unknown kind": reset(1, 7),
    "refused after the head": head_frame(1) + reset(1, RESET_REFUSED),
}
HOSTILE = OF_A_STREAM | {
    "an unknown kind": frame(10, 1),
    "kind 0": frame(0, 1),
    "a huge length": HEADER.pack(MAX_PAYLOAD + 1, DATA, 1),
    "the largest length": HEADER.pack(2**32 - 1, DATA, 1),
    "a reset of two bytes": frame(RESET, 1, b"\0\0"),
    "credit of three bytes": frame(CREDIT, 1, b"\0\0\1"),
    "a ping of one byte": frame(PING, 0, b"1"),
    "LAST with a payload": frame(LAST, 0, b"x"),
    "OPEN of its own stream": frame(OPEN, 2, b"GET /\r\n"),
    "a stream that was never opened": head_frame(2),
    "data of a stream that was never opened": frame(DATA, 2**32 - 1, b"x"),
    "data of the connection": frame(DATA, 0, b"x"),
    "credit for the connection": credit(0, 1),
    "an answer to no ping": frame(PING | END, 0, b"12345678"),
    "no frame": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("hostile", list(HOSTILE))
@scenario
async def test_a_frame_that_a_worker_cannot_have_sent_ends_the_connection(
    hostile: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(framed: Framed) -> None:
        await framed.request()
        await framed.send(HOSTILE[hostile])
        await framed.connection.wait_closed()

    async with streams(script) as (upstream, origin):
        answer = await upstream.send(origin, "POST", "/", b"", [b"{}"])
        await until(lambda: answer._error is not None)
        with pytest.raises(WorkerGarbage if hostile in OF_A_STREAM else WorkerCutShort) as caught:
            await answer.read(1 << 30)
        assert "broken the format" in caught.value.message
        assert isinstance(caught.value.__cause__, FrameError)
        assert upstream.stats()[:2] == (0, 0)
        assert caplog.text.count("its connection is closed") == 1


@scenario
async def test_what_one_stream_does_wrong_ends_all_of_the_connection_and_nothing_else() -> None:
    worker = Streaming()
    async with streams(worker) as (upstream, origin):
        framed, stream, answer = await worker.begun(upstream, origin)
        _, _, other = await worker.begun(upstream, origin)
        framed.write(frame(DATA | END, stream, b"whole") + frame(LEAVE, stream))  # one that is over
        assert await answer.read(100) == b"whole"
        with pytest.raises(WorkerCutShort):
            await other.chunk()
        await worker.begun(upstream, origin)
        assert upstream.stats().connects == 2


# --- writing --------------------------------------------------------------------------------------


class Counting:
    """A transport that counts its writes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


@scenario
async def test_what_is_sent_in_one_turn_leaves_in_one_write() -> None:
    async with streams(echo) as (upstream, origin):
        assert await get(upstream, origin) == (200, b"{}")
        [connection] = upstream._connections
        counting = connection._transport = Counting(connection._transport)
        answers = await asyncio.gather(*(post(upstream, origin, b"%d" % number) for number in range(20)))
        assert counting.writes == 1
        assert [await answer.read(100) for answer in answers] == [b"%d" % number for number in range(20)]


@scenario
async def test_what_is_small_and_what_is_large_leave_in_their_order() -> None:
    async with streams(echo) as (upstream, origin):
        bodies = [b"small", LARGE[:WINDOW], b"", LARGE[: WINDOW - 1], b"small"]
        for body in bodies:  # one after the other: `echo` takes no two at once
            assert await get(upstream, origin, body) == (200, body)


@scenario
async def test_what_was_written_leaves_before_a_connection_closes() -> None:
    async def script(framed: Framed) -> None:
        stream, _, _ = await framed.request()
        framed.write(head_frame(stream) + frame(LAST, 0))
        seen.append(await framed.until(RESET))

    seen: list[Frame] = []
    async with streams(script) as (upstream, origin):
        answer = await post(upstream, origin)
        answer.abort()
        await until(lambda: bool(seen))
