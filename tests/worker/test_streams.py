from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.wire.streams import (
    END,
    MAX_PAYLOAD,
    PING,
    UPGRADE_PATH,
    WINDOW,
    frame,
)
from tests.waiting import wait_for
from tests.worker.frames import Mux, Refused, Server, serving
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


def application() -> FastAPI:
    app = FastAPI()
    app.state.seen = seen = Seen()
    add_streams(app)

    @app.middleware("http")
    async def require_key(request: Request, call_next: Any) -> Response:
        if request.url.path.startswith("/v1") and request.headers.get("authorization") != "Bearer secret":
            return Response("Unauthorized", 401)
        answer: Response = await call_next(request)
        return answer

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

    @app.get("/endless")
    async def endless() -> Response:
        async def events() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield bytes(32768)
                    seen.sent += 32768
            finally:
                seen.left += 1

        return StreamingResponse(events())

    return app


APPLICATIONS: list[FastAPI] = []


@pytest.fixture(scope="module", params=["httptools-asyncio", "httptools-uvloop", "h11-asyncio", "h11-uvloop"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    http, loop = request.param.split("-")
    with serving(application(), http=http, loop=loop) as server:
        yield server


@pytest.fixture
def seen(server: Server) -> Seen:
    found: Seen = server.uvicorn.config.app.state.seen
    return found


@pytest.fixture
def mux(server: Server) -> Iterator[Mux]:
    with server.connect(KEY) as mux:
        yield mux
    wait_for(lambda: server.tasks == server.connections == 0, "the end of all tasks and connections")


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
        server.url + target, headers=[(k, v.encode("latin-1")) for k, v in headers.items()]
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
    mux.send(frame(PING, 0, b"12345678") + frame(PING | END, 0, b"ignored!"))
    while not mux.frames:
        mux.read()
    assert mux.frames == [(PING, True, 0, b"12345678")]
