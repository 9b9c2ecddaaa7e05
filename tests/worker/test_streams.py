from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
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
    UPGRADE_PATH,
    WINDOW,
    credit,
    frame,
    reset,
)
from tests.orchestrator import certificate
from tests.waiting import LIMIT_S, wait_for
from tests.worker.frames import Mux, Refused, Server, serving
from worker import streams
from worker.streams import Streams, add_streams

KEY = {"authorization": "Bearer secret"}
MIB = 1024 * 1024


class Seen:
    """What calls of the application have seen."""

    def __init__(self) -> None:
        self.begun = 0
        self.left = 0  # clients
        self.sent = 0  # bytes, by what sends for ever
        self.ended: list[str] = []
        self.go = threading.Event()


class Slow:
    """It lets nobody in before it is told to."""

    def __init__(self, app: ASGIApp, seen: Seen) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while scope["type"] == "http" and not self._seen.go.is_set():  # noqa: ASYNC110  # by another thread
            await asyncio.sleep(0.01)
        await self._app(scope, receive, send)


class RequireKey:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = scope["type"] == "http" and scope["path"].startswith("/v1")
        if is_guarded and (b"authorization", b"Bearer secret") not in scope["headers"]:
            await Response("Unauthorized", 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def application() -> FastAPI:
    app = FastAPI()
    app.state.seen = seen = Seen()
    add_streams(app)

    app.add_middleware(RequireKey)

    @app.api_route("/scope/{name}", methods=["GET", "POST"])
    async def scope(request: Request) -> dict[str, Any]:
        wanted = ("http_version", "scheme", "method", "root_path", "path", "client", "server", "type")
        told = {name: request.scope[name] for name in wanted}
        told |= {name: request.scope[name].decode() for name in ("raw_path", "query_string")}
        headers = [(name.decode(), value.decode("latin-1")) for name, value in request.scope["headers"]]
        return told | {"asgi": request.scope["asgi"], "headers": headers}

    @app.post("/v1/size")
    async def size(request: Request) -> dict[str, int]:
        return {"size": len(await request.body())}

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.get("/stream/{count}")
    async def stream(count: int) -> Response:
        async def events() -> AsyncIterator[bytes]:
            for number in range(count):
                yield b"data: %d\n\n" % number
                await asyncio.sleep(0)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/large/{size}")
    async def large(size: int) -> Response:
        return Response(bytes(size))

    @app.get("/hang")
    async def hang() -> Response:
        """It sends an event, and nothing more until its client leaves."""

        async def events() -> AsyncIterator[bytes]:
            seen.begun += 1
            try:
                yield b"data: first\n\n"
                await asyncio.Event().wait()
            finally:
                seen.left += 1

        return StreamingResponse(events())

    app.mount("/raw", Raw(seen))
    return app


class Raw:
    """An ASGI application that answers as the last part of the path says."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        case = scope["path"].rpartition("/")[2].replace("-", "_")
        return await getattr(self, case)(receive, send)

    async def answers_who_left(self, receive: Receive, send: Send) -> None:
        message = await receive()
        while message["type"] == "http.request":
            message = await receive()
        await self._head(send)
        await self._body(send, message["type"].encode(), more=False)

    async def raises(self, receive: Receive, send: Send) -> None:
        raise ValueError("as it should")

    async def raises_late(self, receive: Receive, send: Send) -> None:
        await self.returns_late(receive, send)
        raise ValueError("as it should")

    async def returns(self, receive: Receive, send: Send) -> None:
        pass

    async def returns_late(self, receive: Receive, send: Send) -> None:
        await self._head(send)
        await self._body(send, b"first")

    async def returns_a_value(self, receive: Receive, send: Send) -> str:
        return "value"

    async def body_first(self, receive: Receive, send: Send) -> None:
        await self._body(send, b"first")

    async def two_heads(self, receive: Receive, send: Send) -> None:
        await self._head(send)
        await self._head(send)

    async def after_its_end(self, receive: Receive, send: Send) -> None:
        await self._head(send)
        await self._body(send, b"all", more=False)
        await self._body(send, b"more")

    async def too_long(self, receive: Receive, send: Send) -> None:
        await self._head(send, (b"Content-Length", b"3"))
        await self._body(send, b"four")

    async def too_short(self, receive: Receive, send: Send) -> None:
        await self._head(send, (b"content-length", b"3"))
        await self._body(send, b"ab", more=False)

    async def bad_status(self, receive: Receive, send: Send) -> None:
        await self._head(send, status=101)

    async def bad_header(self, receive: Receive, send: Send) -> None:
        await self._head(send, (b"x", b"a\r\nb: c"))

    async def many_headers(self, receive: Receive, send: Send) -> None:
        await self._head(send, *[(b"x", b"")] * 1025)

    async def huge_header(self, receive: Receive, send: Send) -> None:
        await self._head(send, (b"x", bytes([120]) * MAX_PAYLOAD))

    async def body_of_no_content(self, receive: Receive, send: Send) -> None:
        await self._head(send, status=204)
        await self._body(send, b"body", more=False)

    async def early(self, receive: Receive, send: Send) -> None:
        await self._head(send)
        await self._body(send, b"early", more=False)

    async def endless(self, receive: Receive, send: Send) -> None:
        await receive()
        left = asyncio.ensure_future(receive())
        await self._head(send)
        while not left.done():
            await self._body(send, bytes(32768))
            self._seen.sent += 32768
        self._seen.left += 1

    async def reads_later(self, receive: Receive, send: Send) -> None:
        while not self._seen.go.is_set():  # noqa: ASYNC110  # set by the test's thread
            await asyncio.sleep(0.01)
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await self._head(send)
        await self._body(send, b"%d" % size, more=False)

    async def _head(self, send: Send, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


@pytest.fixture(scope="module", params=["httptools-uvloop", "h11-asyncio"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    http, loop = request.param.split("-")
    with serving(application(), http=http, loop=loop) as server:
        yield server


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Have uvicorn's lines heard, whatever a server in this process has made of its loggers."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def seen(server: Server) -> Seen:
    app: Any = server.uvicorn.config.app
    found: Seen = app.state.seen
    return found


@pytest.fixture
def mux(server: Server) -> Iterator[Mux]:
    with server.connect(KEY) as mux:
        yield mux
    wait_for(lambda: server.tasks == server.connections == 0, "the end of all tasks and connections")


@pytest.mark.parametrize(("http", "loop"), [("httptools", "asyncio"), ("h11", "uvloop")])
def test_parsers_and_loops_can_be_had_in_other_pairs(http: str, loop: str) -> None:
    app = application()
    with serving(app, http=http, loop=loop) as server, server.connect(KEY) as mux:
        assert mux.ask("POST", "/echo", b"body").body == b"body"
        assert mux.ask("GET", f"/large/{MIB}").body == bytes(MIB)
        number = hang(mux)
        mux.send(reset(number, RESET_CANCELLED))
        wait_for(lambda: app.state.seen.left == 1, "the application to hear of it")


# --- the upgrade ----------------------------------------------------------------------------------------


def test_the_key_is_asked_for_at_the_upgrade(server: Server) -> None:
    with pytest.raises(Refused) as refused:
        server.connect()
    assert refused.value.status == 401


def test_the_key_is_asked_for_on_each_stream(mux: Mux) -> None:
    assert mux.ask("POST", "/v1/size", b"four").status == 401
    assert json.loads(mux.ask("POST", "/v1/size", b"four", KEY).body) == {"size": 4}


def test_another_version_is_answered_with_ours(server: Server) -> None:
    with pytest.raises(Refused) as refused:
        server.connect(KEY, version=b"baton-streams/2")
    assert refused.value.status == 426
    assert b"upgrade: baton-streams/1" in refused.value.head


def test_a_plain_request_for_the_path_is_no_upgrade(server: Server) -> None:
    answer = httpx.get(server.url + UPGRADE_PATH, headers=KEY)
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "baton-streams/1")


def test_an_application_without_the_route_answers_404() -> None:
    with serving(Streams(FastAPI())) as server, pytest.raises(Refused) as refused:
        server.connect(KEY)
    assert refused.value.status == 404


def wrapped_send(app: ASGIApp) -> ASGIApp:
    """As a server that is not uvicorn: its `send` is nobody's method."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, lambda message: send(message))

    return call


def test_under_another_server_there_are_no_streams() -> None:
    with serving(wrapped_send(application())) as server, pytest.raises(Refused) as refused:
        server.connect(KEY)
    assert refused.value.status == 501


def test_a_stream_cannot_be_upgraded(mux: Mux) -> None:
    upgrade = KEY | {"connection": "upgrade", "upgrade": "baton-streams/1"}
    assert mux.ask("GET", UPGRADE_PATH, headers=upgrade).status == 501


def test_plain_requests_are_served_beside_streams(server: Server, mux: Mux) -> None:
    plain = httpx.post(server.url + "/echo", content=b"plain")
    assert (plain.status_code, plain.content) == (200, b"plain")
    assert mux.ask("POST", "/echo", b"framed").body == b"framed"


# --- requests and answers -------------------------------------------------------------------------------


def test_the_scope_is_that_of_a_plain_request(server: Server, mux: Mux) -> None:
    target, headers = "/scope/a%20b?x=%31&y", {"host": "worker", "x-Name": "v\xe4lue", "accept": "*/*"}
    plain = httpx.get(
        server.url + target,
        headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    ).json()
    framed = json.loads(mux.ask("GET", target, headers=headers).body)
    assert framed.pop("client") != plain.pop("client")
    assert ["x-name", "v\xe4lue"] in framed["headers"]
    for told in (plain, framed):
        told["headers"] = [field for field in told["headers"] if field[0] in ("host", "x-name", "accept")]
    assert sorted(framed.pop("headers")) == sorted(plain.pop("headers"))
    assert framed == plain


def test_the_answer_is_that_of_a_plain_request(server: Server, mux: Mux) -> None:
    for path in ("/scope/x", "/stream/3", "/nowhere"):
        plain, framed = httpx.get(server.url + path), mux.ask("GET", path)
        assert framed.status == plain.status_code
        assert framed.is_whole
        dropped = {"transfer-encoding"}  # frames are the framing
        assert framed.headers.keys() == plain.headers.keys() - dropped
        assert framed.headers["server"] == "uvicorn"
        if path != "/scope/x":
            assert framed.body == plain.content


def test_an_answer_to_head_has_no_body(mux: Mux) -> None:
    answer = mux.ask("HEAD", "/scope/x")
    assert (answer.status, answer.body, answer.is_whole) == (405, b"", True)


def test_many_streams_at_once(mux: Mux) -> None:
    opened = [mux.opening("GET", "/stream/20") for _ in range(200)]
    mux.send(b"".join(frames for _, frames in opened))
    wanted = b"".join(b"data: %d\n\n" % number for number in range(20))
    assert all(mux.answer(number).body == wanted for number, _ in opened)
    assert all(mux.answer(number).is_whole for number, _ in opened)


def test_frames_may_come_in_any_pieces(mux: Mux) -> None:
    number, frames = mux.opening("POST", "/echo", b"body")
    for start in range(len(frames)):
        mux.send(frames[start : start + 1])
    assert mux.answer(number).body == b"body"


def test_a_body_may_come_in_pieces(mux: Mux) -> None:
    number = mux.open_without_end("POST", "/echo")
    for piece in (b"a", b"", b"bc", b""):
        mux.body(number, piece)
    mux.body(number, b"", is_last=True)
    assert mux.answer(number).body == b"abc"


@pytest.mark.parametrize("size", [MAX_PAYLOAD, WINDOW, 16 * MIB])
def test_a_large_body_is_taken_within_its_credit(mux: Mux, size: int) -> None:
    number = mux.open_without_end("POST", "/v1/size", KEY)
    sent = 0
    while sent < size:
        allowed = WINDOW + mux.credits.get(number, 0) - sent
        if allowed:
            piece = min(allowed, MAX_PAYLOAD, size - sent)
            mux.body(number, bytes(piece), is_last=sent + piece == size)
            sent += piece
        else:
            mux.read()
    assert json.loads(mux.answer(number).body) == {"size": size}


@pytest.mark.parametrize("size", [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, WINDOW + 1, 16 * MIB])
def test_a_large_answer_comes_within_its_credit(mux: Mux, size: int) -> None:
    answer = mux.ask("GET", f"/large/{size}")
    assert answer.body == bytes(size)
    assert all(len(got.payload) <= MAX_PAYLOAD for got in mux.frames)


def test_a_ping_is_answered(mux: Mux) -> None:
    mux.send(frame(PING, 0, b"12345678"))
    while not mux.frames:
        mux.read()
    assert mux.frames == [(PING, True, 0, b"12345678")]


# --- clients that leave ---------------------------------------------------------------------------------


def hang(mux: Mux) -> int:
    """A stream that has begun and waits for its client to leave."""
    number = mux.open("GET", "/hang")
    while not mux.answers[number].body:
        mux.read()
    return number


def test_a_reset_ends_the_request_and_no_other(mux: Mux, seen: Seen) -> None:
    left, numbers = seen.left, [hang(mux) for _ in range(2)]
    mux.send(reset(numbers[0], RESET_CANCELLED))
    wait_for(lambda: seen.left == left + 1, "the application to hear of it")
    assert mux.ask("POST", "/echo", b"after").body == b"after"
    assert not mux.answers[numbers[0]].is_over  # nothing more of it came
    assert seen.left == left + 1
    mux.send(reset(numbers[1], RESET_CANCELLED))
    wait_for(lambda: seen.left == left + 2, "the other one")


def test_frames_that_cross_an_end_are_dropped(mux: Mux) -> None:
    number = mux.open("POST", "/echo", b"")
    mux.answer(number)
    cancelled = hang(mux)
    mux.send(reset(cancelled, RESET_CANCELLED))
    for over in (number, cancelled):
        late = frame(BODY, over, b"late"), credit(over, MAX_CREDIT), frame(LEAVE, over)
        mux.send(b"".join([*late, *late, reset(over, RESET_CANCELLED), reset(over, RESET_CANCELLED)]))
    assert mux.ask("POST", "/echo", b"after").body == b"after"


def test_a_request_that_is_reset_at_once_does_no_harm(mux: Mux, seen: Seen) -> None:
    begun, left = seen.begun, seen.left
    for _ in range(50):
        number, frames = mux.opening("GET", "/hang")
        mux.send(frames + reset(number, RESET_CANCELLED))
    assert mux.ask("POST", "/echo", b"after").body == b"after"
    wait_for(lambda: seen.begun - begun == seen.left - left, "the end of what began")


def test_an_answer_of_which_the_client_left_is_broken_off(mux: Mux, seen: Seen) -> None:
    left, number = seen.left, hang(mux)
    mux.send(frame(LEAVE, number))
    assert mux.answer(number).reset == RESET_BROKEN
    assert seen.left == left + 1


def test_an_answer_that_comes_although_the_client_left_is_whole(mux: Mux) -> None:
    number = mux.open("GET", "/raw/answers-who-left")
    mux.send(frame(LEAVE, number))
    answer = mux.answer(number)
    assert (answer.status, answer.body, answer.is_whole) == (200, b"http.disconnect", True)


@pytest.mark.parametrize("way", ["close", "reset", "half"])
def test_a_lost_connection_ends_all_its_requests(server: Server, seen: Seen, way: str) -> None:
    left = seen.left
    with server.connect(KEY) as mux, server.connect(KEY) as other:
        for _ in range(5):
            hang(mux)
        remains = hang(other)
        if way == "reset":
            mux.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        elif way == "half":
            mux.socket.shutdown(socket.SHUT_WR)
            assert not mux.read_to_end()
        mux.socket.close()
        wait_for(lambda: seen.left == left + 5, "the application to hear of it")
        assert not other.answers[remains].is_over
        other.send(frame(LEAVE, remains))
        assert other.answer(remains).is_over
    wait_for(lambda: server.tasks == server.connections == 0, "the end of all tasks and connections")


# --- applications that err ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "status", "body", "was_reset"),
    [
        ("raises", 500, b"Internal Server Error", None),
        ("raises-late", 200, b"first", RESET_BROKEN),
        ("returns", 500, b"Internal Server Error", None),
        ("returns-late", 200, b"first", RESET_BROKEN),
        ("returns-a-value", 500, b"Internal Server Error", None),
        ("body-first", 500, b"Internal Server Error", None),
        ("two-heads", 200, b"", RESET_BROKEN),
        ("after-its-end", 200, b"all", None),
        ("too-long", 200, b"", RESET_BROKEN),
        ("too-short", 200, b"", RESET_BROKEN),
        ("bad-status", 500, b"Internal Server Error", None),
        ("bad-header", 500, b"Internal Server Error", None),
        ("many-headers", 500, b"Internal Server Error", None),
        ("huge-header", 500, b"Internal Server Error", None),
        ("body-of-no-content", 204, b"", RESET_BROKEN),
    ],
)
def test_what_the_application_does_not_answer(
    mux: Mux, caplog: pytest.LogCaptureFixture, case: str, status: int, body: bytes, was_reset: int | None
) -> None:
    answer = mux.ask("GET", f"/raw/{case}")
    assert (answer.status, answer.body, answer.reset) == (status, body, was_reset)
    assert answer.is_whole == (was_reset is None)
    wait_for(lambda: "ASGI" in caplog.text, "the error in the log")
    assert mux.ask("POST", "/echo", b"after").body == b"after"


def test_an_application_may_answer_before_the_body_is_there(mux: Mux) -> None:
    number = mux.open_without_end("POST", "/raw/early")
    assert mux.answer(number).body == b"early"
    mux.body(number, bytes(WINDOW), is_last=True)  # which was under way
    assert mux.ask("POST", "/echo", b"after").body == b"after"


# --- backpressure ---------------------------------------------------------------------------------------


def test_a_stream_without_credit_waits_and_others_do_not(mux: Mux, seen: Seen) -> None:
    mux.gives_credit = False
    left = seen.left
    slow = mux.open("GET", "/raw/endless")
    while len(mux.answers[slow].body) < WINDOW:
        mux.read()
    assert mux.ask("GET", f"/large/{WINDOW}").body == bytes(WINDOW)
    assert len(mux.answers[slow].body) == WINDOW
    mux.send(credit(slow, 10))
    while len(mux.answers[slow].body) < WINDOW + 10:
        mux.read()
    assert mux.ask("POST", "/echo", b"after").body == b"after"
    assert len(mux.answers[slow].body) == WINDOW + 10
    mux.send(reset(slow, RESET_CANCELLED))
    wait_for(lambda: seen.left == left + 1, "the application to hear of it")


def test_applications_wait_while_the_connection_is_full(server: Server, seen: Seen) -> None:
    seen.sent, left = 0, seen.left
    with server.connect(KEY, receive_buffer=4096) as mux:
        opened = [mux.opening("GET", "/raw/endless") for _ in range(20)]
        mux.send(b"".join(frames + credit(number, MAX_CREDIT - WINDOW) for number, frames in opened))
        connection = server.connection()
        wait_for(lambda: len(connection.output._waiting) == 20, "the connection to be full")
        assert seen.sent < 16 * MIB
        for number, _ in opened:  # each gets its turn
            while len(mux.answers[number].body) < 2 * 65536:
                mux.read()
        assert max(len(answer.body) for answer in mux.answers.values()) < 8 * MIB
    wait_for(lambda: seen.left == left + 20, "the application to hear of it")


def test_a_small_answer_comes_between_large_ones(mux: Mux) -> None:
    large = [mux.opening("GET", f"/large/{8 * MIB}") for _ in range(4)]
    mux.send(b"".join(frames + credit(number, MAX_CREDIT - WINDOW) for number, frames in large))
    mux.gives_credit = False
    mux.read()
    assert mux.ask("POST", "/echo", b"small").body == b"small"
    assert sum(len(mux.answers[number].body) for number, _ in large) < 16 * MIB
    assert all(mux.answer(number).is_whole for number, _ in large)


# --- the end of the server ------------------------------------------------------------------------------


def test_a_server_that_stops_lets_streams_end(server: Server) -> None:
    same = {"http": server.uvicorn.config.http, "loop": server.uvicorn.config.loop}
    with serving(application(), **same) as stopping, stopping.connect(KEY) as mux:
        number = hang(mux)
        with stopping.connect(KEY) as idle:
            stopping.stop()
            assert not idle.read_to_end()
            assert idle.is_closing
        while not mux.is_closing:
            mux.read()
        assert mux.ask("POST", "/echo", b"late").reset == RESET_REFUSED
        assert not mux.answers[number].is_over
        mux.send(frame(LEAVE, number))
        assert mux.answer(number).is_over
        assert not mux.read_to_end()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_last_answer_is_not_lost_to_frames_that_cross_it(loop: str) -> None:
    with serving(application(), loop=loop) as stopping, stopping.connect(KEY, receive_buffer=4096) as mux:
        number = mux.open("GET", f"/large/{WINDOW}")
        connection = stopping.connection()
        stopping.stop()
        wait_for(lambda: connection._limit is not None, "the end of the last answer")
        for _ in range(100):
            mux.send(frame(PING, 0, b"12345678") + credit(number, 1))
        assert mux.answer(number).body == bytes(WINDOW)
        assert not mux.read_to_end()


def test_a_peer_that_reads_slowly_gets_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_END_S", 0.01)
    patient = serving(application(), timeout_graceful_shutdown=None)
    with patient as stopping, stopping.connect(KEY, receive_buffer=65536) as mux:
        mux.gives_credit = False
        number, frames = mux.opening("GET", f"/large/{16 * MIB}")
        mux.send(frames + credit(number, 16 * MIB))
        connection = stopping.connection()
        wait_for(lambda: connection.output.is_full, "the connection to be full")
        stopping.stop()
        while not mux.is_closing or not mux.answers[number].is_over:
            assert mux.read()
        assert mux.answers[number].body == bytes(16 * MIB)


def test_a_peer_that_does_not_close_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_END_S", 0.1)
    with contextlib.ExitStack() as stack:
        with serving(application(), timeout_graceful_shutdown=None) as server:
            mux = stack.enter_context(server.connect(KEY))
        mux.read_to_end()  # as it may


def test_an_upgrade_that_a_stopping_server_answers_is_the_last(server: Server) -> None:
    app = application()
    app.add_middleware(Slow, seen=app.state.seen)
    same = {"http": server.uvicorn.config.http, "loop": server.uvicorn.config.loop}
    with serving(app, timeout_graceful_shutdown=None, **same) as stopping:
        connecting = ThreadPoolExecutor(1).submit(stopping.connect, KEY)
        wait_for(lambda: stopping.tasks == 1, "the upgrade to be asked for")
        http = stopping.connection()
        stopping.stop()
        wait_for(lambda: not http.cycle.keep_alive, "the server to stop")
        app.state.seen.go.set()
        with connecting.result(LIMIT_S) as mux:
            assert not mux.read_to_end()
            assert mux.is_closing


def test_a_server_that_waits_no_longer_cancels_streams(caplog: pytest.LogCaptureFixture) -> None:
    app = application()
    with serving(app, timeout_graceful_shutdown=1) as server, server.connect(KEY) as mux:
        number = hang(mux)
        server.stop()
        assert mux.answer(number).reset == RESET_BROKEN
        assert mux.answers[number].body == b"data: first\n\n"
        assert not mux.read_to_end()
    assert app.state.seen.left == 1
    assert "timeout graceful shutdown exceeded" in caplog.text


# --- hostile frames -------------------------------------------------------------------------------------

HOSTILE = {
    "of an unknown kind": b"\0\0\0\0\x0a\0\0\0\0",
    "of kind 0": b"\0\0\0\0\0\0\0\0\0",
    "huge": (MAX_PAYLOAD + 1).to_bytes(4, "big") + b"\x02\0\0\0\x01",
    "a reset of two bytes": frame(RESET, 1, b"ab"),
    "a leave with a payload": frame(LEAVE, 1, b"a"),
    "a credit of three bytes": frame(CREDIT, 1, b"abc"),
    "a short ping": frame(PING, 0, b"1234"),
    "an answer to no ping": frame(PING | END, 0, b"12345678"),
    "a ping of a stream": frame(PING, 1, b"12345678"),
    "a body of the connection": frame(BODY, 0, b"abc"),
    "a reset of the connection": reset(0, RESET_CANCELLED),
    "an opening of stream 0": frame(OPEN, 0, b"GET / \r\n"),
    "a head": frame(HEAD, 1, b"\0\0"),
    "data": frame(DATA, 1, b""),
    "data of no stream": frame(DATA, 9, b""),
    "a last": frame(LAST, 0),
    "a body of a stream that was never opened": frame(BODY, 9, b"abc"),
    "a credit for a stream that was never opened": credit(9, 1),
    "a reset of a stream that was never opened": reset(9, RESET_CANCELLED),
    "a second opening": frame(OPEN, 1, b"GET /hang\r\n"),
    "a body after its end": frame(BODY, 1, b"abc"),
    "too much credit": credit(1, MAX_CREDIT),
    "too much credit in two frames": credit(1, MAX_CREDIT - WINDOW) + credit(1, 1),
    "an empty head": frame(OPEN, 2),
    "a head without a line end": frame(OPEN, 2, b"GET /hang"),
    "a head without a target": frame(OPEN, 2, b"GET\r\n"),
    "a target that is no path": frame(OPEN, 2, b"GET http://worker/hang\r\n"),
    "a target with a space": frame(OPEN, 2, b"GET /hang HTTP/1.1\r\n"),
    "a target with other bytes": frame(OPEN, 2, b"GET /h\xe4ng\r\n"),
    "a header that is none": frame(OPEN, 2, b"GET /hang\r\nhost\r\n"),
    "a header without a name": frame(OPEN, 2, b"GET /hang\r\n: value\r\n"),
    "a header with a line break": frame(OPEN, 2, b"GET /hang\r\nhost: a\nb\r\n"),
    "a header with NUL": frame(OPEN, 2, b"GET /hang\r\nhost: a\0b\r\n"),
    "plain HTTP": b"GET /health HTTP/1.1\r\nhost: worker\r\n\r\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_wrong_frames_end_the_connection(
    server: Server, seen: Seen, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    with server.connect(KEY) as other, server.connect(KEY) as mux:
        unharmed, left = hang(other), seen.left
        hang(mux)
        caplog.clear()
        mux.send(HOSTILE[case])
        mux.read_to_end()
        wait_for(lambda: seen.left == left + 1, "the application to hear of it")
        (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert line.startswith("A connection from 127.0.0.1:")
        other.send(frame(LEAVE, unharmed))
        assert other.answer(unharmed).is_over
    wait_for(lambda: server.tasks == server.connections == 0, "the end of all tasks and connections")


def test_a_body_beyond_its_credit_ends_the_connection(
    mux: Mux, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    seen.go.clear()
    number = mux.open_without_end("POST", "/raw/reads-later")
    mux.body(number, bytes(WINDOW))
    mux.send(frame(BODY, number, b"x"))
    mux.read_to_end()
    assert f"1 bytes of stream {number} beyond its credit" in caplog.text
    seen.go.set()


def test_more_streams_than_allowed_are_refused(mux: Mux, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STREAMS", 3)
    left, open_ones = seen.left, [hang(mux) for _ in range(3)]
    assert mux.ask("POST", "/echo", b"more").reset == RESET_REFUSED
    mux.send(frame(LEAVE, open_ones[0]))
    mux.answer(open_ones[0])
    assert mux.ask("POST", "/echo", b"again").body == b"again"
    mux.send(frame(LEAVE, open_ones[1]) + frame(LEAVE, open_ones[2]))
    wait_for(lambda: seen.left == left + 3, "their end")


def test_heads_together_are_bounded(mux: Mux, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_HEADS", 20_000)
    number = hang(mux)
    assert mux.ask("GET", "/stream/1", headers={"x": "x" * 20_000}).reset == RESET_REFUSED
    for _ in range(3):
        assert mux.ask("GET", "/stream/1", headers={"x": "x" * 9_000}).status == 200
    many = {f"x{number}": "" for number in range(200)}  # each is more than its text
    assert mux.ask("GET", "/stream/1", headers=many).reset == RESET_REFUSED
    mux.send(frame(LEAVE, number))
    mux.answer(number)


def test_bodies_that_nobody_reads_are_bounded_together(
    mux: Mux, server: Server, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.go.clear()
    monkeypatch.setattr(streams, "MOST_UNREAD", MIB)
    numbers = [mux.open_without_end("POST", "/raw/reads-later") for _ in range(40)]
    connection = server.connection()

    def send() -> None:
        for number in numbers:
            mux.body(number, bytes(WINDOW), is_last=True)

    sender = threading.Thread(target=send)
    sender.start()
    wait_for(lambda: connection._unread > MIB, "the worker to read no more")
    assert connection._unread < 2 * MIB
    seen.go.set()
    assert all(mux.answer(number).body == b"%d" % WINDOW for number in numbers)
    sender.join(LIMIT_S)
    assert connection._unread == 0


def test_who_asks_much_and_reads_nothing_is_cut_off(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.connect(KEY, receive_buffer=4096) as mux:
        pings = frame(PING, 0, b"12345678") * 10_000
        with pytest.raises(OSError):  # noqa: PT011, PT012  # reset, or a broken pipe
            for _ in range(1000):
                mux.send(pings)
        assert "are not read" in caplog.text
    wait_for(lambda: server.tasks == server.connections == 0, "the end of all tasks and connections")


# --- as under plain HTTP --------------------------------------------------------------------------------


def test_requests_are_in_the_access_log(mux: Mux, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mux.ask("GET", "/stream/1?a=%20b")
    port = mux.socket.getsockname()[1]
    lines = [record for record in caplog.records if record.name == "uvicorn.access"]
    assert lines[-1].getMessage() == f'127.0.0.1:{port} - "GET /stream/1?a=%20b HTTP/1.1" 200'
    assert lines[-1].args == (f"127.0.0.1:{port}", "GET", "/stream/1?a=%20b", "1.1", 200)


def test_the_upgrade_is_in_the_access_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with server.connect(KEY):
        assert f'"GET {UPGRADE_PATH} HTTP/1.1" 101' in caplog.text


def test_there_is_no_access_log_where_uvicorn_has_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(application(), access_log=False) as server, server.connect(KEY) as mux:
        assert mux.ask("GET", "/stream/1").status == 200
    assert "/stream/1" not in caplog.text


def test_uvicorns_limit_holds_for_streams(server: Server) -> None:
    with serving(application(), limit_concurrency=3) as limited, limited.connect(KEY) as mux:
        open_ones = [hang(mux) for _ in range(3)]
        answer = mux.ask("GET", "/stream/1")
        assert (answer.status, answer.body) == (503, b"Service Unavailable")
        mux.send(b"".join(reset(number, RESET_CANCELLED) for number in open_ones))


def test_a_root_path_is_part_of_the_path() -> None:
    with serving(application(), root_path="/base") as server, server.connect(KEY) as mux:
        plain = httpx.get(server.url + "/scope/x").json()
        told = json.loads(mux.ask("GET", "/scope/x").body)
        assert told["path"] == plain["path"] == "/base/scope/x"
        assert (told["raw_path"], told["root_path"]) == (plain["raw_path"], plain["root_path"])


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_may_be_encrypted(loop: str) -> None:
    options = {"ssl_certfile": certificate.CERT, "ssl_keyfile": certificate.KEY}
    context = ssl.create_default_context(cafile=certificate.CERT)
    with serving(application(), loop=loop, **options) as server, server.connect(KEY, tls=context) as mux:
        assert json.loads(mux.ask("GET", "/scope/x").body)["scheme"] == "https"
        assert mux.ask("GET", f"/large/{MIB}").body == bytes(MIB)
        number = hang(mux)
        mux.send(frame(LEAVE, number))
        assert mux.answer(number).is_over


# --- joined writes --------------------------------------------------------------------------------------


class Written(asyncio.Transport):
    """It notes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False


def test_what_is_sent_in_one_turn_leaves_in_one_write() -> None:
    async def main() -> list[bytes]:
        transport = Written()
        output = streams.Output(transport, asyncio.get_running_loop())

        async def send(number: int) -> None:
            for _ in range(2):
                output.put_data(DATA, number, b"token")
                await asyncio.sleep(0)

        await asyncio.gather(*map(send, range(1, 33)))
        await asyncio.sleep(0)
        return transport.writes

    turn = b"".join(frame(DATA, number, b"token") for number in range(1, 33))
    assert asyncio.run(main()) == [turn, turn]


def test_much_is_written_at_once() -> None:
    async def main() -> int:
        transport = Written()
        output = streams.Output(transport, asyncio.get_running_loop())
        for _ in range(3):
            output.put_data(DATA, 1, bytes(MAX_PAYLOAD))
            output.put(frame(HEAD, 1, bytes(MAX_PAYLOAD)))
        return len(transport.writes)

    assert asyncio.run(main()) == 6
