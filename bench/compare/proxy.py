"""A baseline: a two-leg proxy as one would write it with FastAPI, decoding and encoding.

    python -m bench.compare.proxy httpx --port 8000 --prefill http://127.0.0.1:9001 --decode http://127.0.0.1:9002

It asks the workers with httpx, or with aiohttp; only one of them is imported.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from bench.shared.command import parser

PATHS = ["/v1/chat/completions", "/v1/completions"]
KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

Relay = Callable[[Request], Awaitable[Response]]


def prefill_leg(body: dict[str, Any]) -> dict[str, Any]:
    leg = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": KEEP_KV}
    leg.pop("stream_options", None)
    return leg


def decode_leg(body: dict[str, Any], prefill_answer: dict[str, Any]) -> dict[str, Any]:
    return body | {"kv_transfer_params": prefill_answer["kv_transfer_params"]}


@asynccontextmanager
async def with_httpx(prefill: str, decode: str) -> AsyncIterator[Relay]:
    import httpx

    async def relay(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        answer = await client.post(prefill + request.url.path, json=prefill_leg(body))
        leg = client.build_request("POST", decode + request.url.path, json=decode_leg(body, answer.json()))
        answer = await client.send(leg, stream=True)
        if body.get("stream"):
            end = BackgroundTask(answer.aclose)
            return StreamingResponse(answer.aiter_raw(), media_type="text/event-stream", background=end)
        return Response(await answer.aread(), answer.status_code, media_type="application/json")

    # By default a client is limited to 100 connections and 5 s.
    async with httpx.AsyncClient(limits=httpx.Limits(), timeout=None, trust_env=False) as client:  # noqa: S113
        yield relay


@asynccontextmanager
async def with_aiohttp(prefill: str, decode: str) -> AsyncIterator[Relay]:
    import aiohttp

    async def relay(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        async with session.post(prefill + request.url.path, json=prefill_leg(body)) as answer:
            leg = decode_leg(body, await answer.json())
        answer = await session.post(decode + request.url.path, json=leg)
        if body.get("stream"):
            return StreamingResponse(answer.content.iter_any(), media_type="text/event-stream")
        async with answer:
            return Response(await answer.read(), answer.status, media_type="application/json")

    # Without a connector of its own a session is limited to 100 connections.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield relay


CLIENTS = {"httpx": with_httpx, "aiohttp": with_aiohttp}


def app_of(opened: AbstractAsyncContextManager[Relay]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened as relay:
            for path in PATHS:
                app.add_api_route(path, relay, methods=["POST"])
            yield

    return FastAPI(lifespan=lifespan)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("client", choices=CLIENTS)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--prefill", required=True)
    options.add_argument("--decode", required=True)
    given = options.parse_args()
    app = app_of(CLIENTS[given.client](given.prefill, given.decode))
    uvicorn.run(app, port=given.port, log_level="warning", access_log=False, backlog=4096)


if __name__ == "__main__":
    main()
