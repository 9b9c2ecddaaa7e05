"""A baseline: a two-leg proxy as one would write it with FastAPI and httpx, decoding and encoding.

python -m bench.compare.httpx_proxy --port 8000 --prefill http://127.0.0.1:9001 --decode http://127.0.0.1:9002
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from bench.compare.two_legs import PATHS, decode_leg, prefill_leg, serve


def proxy(prefill: str, decode: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # By default a client is limited to 100 connections and 5 s.
        async with httpx.AsyncClient(limits=httpx.Limits(), timeout=None, trust_env=False) as client:  # noqa: S113
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    async def relay(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        client: httpx.AsyncClient = app.state.client
        answer = await client.post(prefill + request.url.path, json=prefill_leg(body))
        leg = client.build_request("POST", decode + request.url.path, json=decode_leg(body, answer.json()))
        answer = await client.send(leg, stream=True)
        if body.get("stream"):
            end = BackgroundTask(answer.aclose)
            return StreamingResponse(answer.aiter_raw(), media_type="text/event-stream", background=end)
        return Response(await answer.aread(), answer.status_code, media_type="application/json")

    for path in PATHS:
        app.add_api_route(path, relay, methods=["POST"])
    return app


if __name__ == "__main__":
    serve(proxy, __doc__)
