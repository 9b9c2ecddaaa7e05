"""A baseline: a two-leg proxy as one would write it with FastAPI and aiohttp, decoding and encoding.

python -m bench.compare.aiohttp_proxy --port 8000 --prefill http://127.0.0.1:9001 --decode http://127.0.0.1:9002
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from bench.compare.two_legs import PATHS, decode_leg, prefill_leg, serve


def proxy(prefill: str, decode: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Without a connector of its own a session is limited to 100 connections.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    async def relay(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        session: aiohttp.ClientSession = app.state.session
        async with session.post(prefill + request.url.path, json=prefill_leg(body)) as answer:
            leg = decode_leg(body, await answer.json())
        answer = await session.post(decode + request.url.path, json=leg)
        if body.get("stream"):
            return StreamingResponse(answer.content.iter_any(), media_type="text/event-stream")
        async with answer:
            return Response(await answer.read(), answer.status, media_type="application/json")

    for path in PATHS:
        app.add_api_route(path, relay, methods=["POST"])
    return app


if __name__ == "__main__":
    serve(proxy, __doc__)
