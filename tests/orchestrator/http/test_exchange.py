"""The contract of `Exchange`: on our own server and, over plain ASGI, on another and in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from orchestrator.errors import ClientGone, NotFound, WorkerAnswered
from orchestrator.http.exchange import Exchange, Handler
from tests.orchestrator.raw_http import app_of, logs_errors, no_errors_logged, run, serving, until

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

Open = Callable[[Handler], Any]


@asynccontextmanager
async def on_our_server(handler: Handler) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(app_of(handler)) as site:
        url = f"http://127.0.0.1:{site.port}"
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield client


@asynccontextmanager
async def on_stock_uvicorn(handler: Handler) -> AsyncIterator[httpx.AsyncClient]:
    config = uvicorn.Config(
        app_of(handler), port=0, ws="none", lifespan="off", log_config=None, http="httptools"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def in_process(handler: Handler) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(handler))
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        yield client


HOSTS = {"ours": on_our_server, "stock uvicorn": on_stock_uvicorn, "in process": in_process}
SERVERS = ["ours", "stock uvicorn"]


@pytest.fixture(params=list(HOSTS))
def host(request: pytest.FixtureRequest) -> Iterator[Open]:
    return HOSTS[request.param]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Open]:
    return HOSTS[request.param]


def test_a_whole_answer(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        assert (exchange.method, exchange.path, exchange.query) == ("POST", "/a b", b"c=d")
        assert exchange.header(b"x-a") == b"b"
        assert exchange.header(b"x-b") is None
        assert (b"x-a", b"b") in exchange.headers
        assert exchange.client is not None
        assert exchange.content_length == 4
        body = await exchange.read_body()
        assert not exchange.is_started
        exchange.respond(201, [(b"x-c", b"d")], body * 2)
        assert exchange.is_started
        assert exchange.is_complete

    async def main() -> None:
        async with host(handler) as client:
            for _ in range(2):
                answer = await client.post("/a b?c=d", content=b"body", headers={"X-A": "b"})
                assert (answer.status_code, answer.content) == (201, b"bodybody")
                assert answer.headers["x-c"] == "d"
                assert answer.headers["content-length"] == "8"

    run(main)


def test_a_large_body(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], await exchange.read_body())

    async def main() -> None:
        async with host(handler) as client:
            body = b"abc" * 1_000_000
            assert (await client.post("/", content=body)).content == body

    run(main)


def test_a_body_piece_by_piece(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        more = asyncio.Event()
        source, pieces = exchange.source, []
        source.on_more(more.set)
        while not source.is_taken:
            more.clear()
            pieces.append(source.take_some())
            if not (pieces[-1] or source.is_taken):
                await more.wait()
        source.on_more(None)
        assert source.take_some() == b""
        exchange.respond(200, [], b"".join(pieces))

    async def slowly() -> AsyncIterator[bytes]:
        for i in range(10):
            yield b"%d" % i * 100_000
            await asyncio.sleep(0)

    async def main() -> None:
        async with host(handler) as client:
            whole = b"".join([piece async for piece in slowly()])
            for content in (whole, b"", b"a", slowly()):
                answer = await client.post("/", content=content)
                assert answer.content == (content if isinstance(content, bytes) else whole)

    run(main)


def test_a_stream(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body()
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        for i in range(5):
            if not exchange.feed(b"%d" % i):
                await exchange.drain()
            exchange.feed(b"")
        exchange.finish(b"!")

    async def main() -> None:
        async with host(handler) as client:
            answer = await client.post("/", content=b"body")
            assert answer.content == b"01234!"
            assert answer.headers["content-type"] == "text/event-stream"

    run(main)


def test_a_pushed_stream(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        left = 100
        done = asyncio.get_running_loop().create_future()

        def push() -> None:
            nonlocal left
            while left:
                left -= 1
                if not exchange.feed(b"x" * 1000):
                    return
            if not done.done():
                done.set_result(None)

        exchange.start(200, [])
        exchange.on_writable(push)
        push()
        await done
        exchange.finish()

    async def main() -> None:
        async with host(handler) as client:
            assert (await client.get("/")).content == b"x" * 100_000

    run(main)


def test_the_pieces_of_a_stream_arrive_as_they_are_fed(server: Open, run: Any) -> None:
    gate = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.feed(b"first")
        await exchange.drain()
        await gate.wait()
        exchange.finish(b"second")

    async def main() -> None:
        async with server(handler) as client, client.stream("GET", "/") as answer:
            pieces = answer.aiter_raw()
            assert await anext(pieces) == b"first"
            gate.set()
            assert await anext(pieces) == b"second"

    run(main)


def test_head(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], b"body")

    async def main() -> None:
        async with host(handler) as client:
            answer = await client.head("/")
            assert answer.content == b""
            assert answer.headers["content-length"] == "4"

    run(main)


@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("not mine", False), (None, False)])
def test_every_answer_carries_a_request_id(given: str | None, kept: bool, host: Open, run: Any) -> None:
    ids: list[str] = []

    async def handler(exchange: Exchange) -> None:
        ids.append(exchange.request_id)
        assert exchange.request_id == ids[-1]
        if exchange.path == "/error":
            raise NotFound("no")
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with host(handler) as client:
            headers = {} if given is None else {"x-request-id": given}
            answers = [await client.get(path, headers=headers) for path in ("/", "/error")]
            assert [answer.headers["x-request-id"] for answer in answers] == ids
            assert all((value == given) is kept for value in ids)

    run(main)


def test_errors_become_answers(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange.path == "/own":
            raise NotFound("no such thing")
        raise WorkerAnswered(422, b"its words", content_type=b"text/plain", retry_after=b"7")

    async def main() -> None:
        async with host(handler) as client:
            own = await client.get("/own")
            assert (own.status_code, own.json()["error"]["message"]) == (404, "no such thing")
            its = await client.get("/its")
            assert (its.status_code, its.content) == (422, b"its words")
            assert (its.headers["content-type"], its.headers["retry-after"]) == ("text/plain", "7")

    run(main)


@pytest.mark.parametrize("how", ["raise", "return", "abort", "error"])
def test_an_answer_that_breaks_off_is_cut(how: str, server: Open, run: Any, logs_errors: None) -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.feed(b"part")
        await exchange.drain()
        if how == "raise":
            raise ValueError
        if how == "error":
            raise NotFound("too late")
        if how == "abort":
            exchange.abort()

    async def main() -> None:
        async with server(handler) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/")

    run(main)


@pytest.mark.parametrize("phase", ["wait", "stream"])
def test_leaving_is_noticed(phase: str, server: Open, run: Any) -> None:
    waiting, left = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.on_leave(left.set)
        await exchange.read_body()
        if phase == "stream":
            exchange.start(200, [])
            exchange.feed(b"a")
        waiting.set()
        await left.wait()
        assert exchange.is_gone
        assert exchange.is_started is False or exchange.feed(b"b") is False
        with pytest.raises(ClientGone):
            await exchange.drain()
        late: list[int] = []
        exchange.on_leave(lambda: late.append(1))
        assert late == [1]

    async def main() -> None:
        async with server(handler) as client:
            asking = asyncio.create_task(client.post("/", content=b"body"))
            await waiting.wait()
            asking.cancel()
            await left.wait()

    run(main)


def test_calls_out_of_order_are_errors(host: Open, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        for call in (exchange.finish, lambda: exchange.feed(b"a")):
            with pytest.raises(RuntimeError):
                call()
        exchange.respond(200, [], b"fine")
        for call in (exchange.finish, lambda: exchange.feed(b"a"), lambda: exchange.start(200, [])):
            with pytest.raises(RuntimeError):
                call()
        exchange.abort()  # no effect any more
        await exchange.read_body()
        with pytest.raises(RuntimeError):
            await exchange.read_body()

    async def main() -> None:
        async with host(handler) as client:
            assert (await client.get("/")).content == b"fine"

    run(main)
