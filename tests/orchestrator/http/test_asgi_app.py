from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from orchestrator.http.limits import ServerLimits
from tests.orchestrator.raw_http import (
    GET,
    SMALL,
    SOON,
    check_error,
    chunked,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures


def control_plane() -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def through(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    @app.get("/json")
    async def get_json(request: Request) -> Any:
        assert request.client is not None
        return {"client": request.client.host, "query": request.query_params.get("a")}

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            for i in range(3):
                yield f"{i}"

        return StreamingResponse(pieces())

    @app.get("/fail")
    async def fail() -> None:
        raise ValueError("as it should")

    return app


def test_fastapi_runs_on_it(run: Any, logs_errors: None) -> None:
    async def main() -> None:
        async with serving(control_plane()) as site, site.client() as client:
            answer = await client.ask(GET.replace(b"/echo", b"/json?a=b"))
            assert answer.json() == {"client": "127.0.0.1", "query": "b"}
            assert answer.headers["x-request-id"].startswith("req-")
            large = b"a" * 5_000_000
            sending = asyncio.create_task(client.send_all(post(large, path=b"/size")))
            assert (await client.answer()).json() == len(large)
            await sending
            assert (await client.ask(chunked(b"abc", b"d", path=b"/size"))).json() == 4
            assert (await client.ask(GET.replace(b"/echo", b"/stream"))).body == b"012"
            assert (await client.ask(GET.replace(b"/echo", b"/none"))).status == 404
            assert (await client.ask(GET.replace(b"/echo", b"/fail"))).status == 500

    run(main)


def test_the_failure_of_a_body_is_answered_for_plain_asgi(run: Any) -> None:
    async def main() -> None:
        limits = replace(SMALL, body_idle_timeout_s=SOON, sweep_s=0.01)
        async with serving(control_plane(), limits) as site:
            check_error(await site.ask(chunked(b"a" * 2000, path=b"/size")), 413)
            check_error(await site.ask(post(b"abc", path=b"/size")[:-1]), 408)
            last = await site.ask(chunked(b"abc", path=b"/size")[:-5] + b"z")
            check_error(last, 400)
            assert [error.status for error in site.refused] == [413, 408, 400]
            assert site.refused_names[-1] == (last.headers["x-request-id"], "/size")

    run(main)


def test_plain_asgi_hears_of_a_client_that_leaves(run: Any) -> None:
    heard = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive()) == {"type": "http.request", "body": b"", "more_body": False}
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        two = await asyncio.gather(receive(), receive())
        assert two == [{"type": "http.disconnect"}] * 2
        await send({"type": "http.response.body", "body": b"b"})  # ignored
        heard.set()

    async def main() -> None:
        async with serving(app) as site:
            async with site.client() as client:
                client.send(GET)
                await client.head()
            await heard.wait()

    run(main)


def test_a_plain_asgi_body_is_not_read_faster_than_it_is_taken(run: Any) -> None:
    gate = asyncio.Event()
    size = 8_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        total = len((await receive())["body"])
        await gate.wait()
        while total < size:
            total += len((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"0")]})
        await send({"type": "http.response.body"})

    async def main() -> None:
        limits = ServerLimits(body_idle_timeout_s=0.3, body_timeout_s=0.5, sweep_s=0.01)
        async with serving(app, limits) as site, site.client() as client:
            sending = asyncio.create_task(client.send_all(post(b"a" * size)))
            await until(lambda: any(c._reader.is_paused for c in site.state.connections))  # type: ignore[union-attr]
            await asyncio.sleep(0.6)  # longer than the body may take, but that is not the client's fault
            gate.set()
            assert (await client.answer()).status == 200
            await sending

    run(main)


@pytest.mark.parametrize("sent", [[b"x-request-id", b"mine"], [b"Connection", b"close"]])
def test_headers_that_are_the_servers_are_taken_over_from_plain_asgi(sent: list[bytes], run: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [sent]})
        await send({"type": "http.response.body", "body": b"abc"})

    async def main() -> None:
        async with serving(app) as site:
            answer = await site.ask(GET)
            assert answer.headers[sent[0].decode().lower()] == sent[1].decode()
            assert answer.body == b"abc"

    run(main)
