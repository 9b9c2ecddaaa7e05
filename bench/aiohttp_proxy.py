"""The baseline: a two-leg proxy as one would write it with FastAPI and aiohttp, decoding and encoding.

python bench/aiohttp_proxy.py --port 8000 --prefill http://127.0.0.1:9001 --decode http://127.0.0.1:9002
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def proxy(prefill: str, decode: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Without a connector of its own a session is limited to 100 connections.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        session: aiohttp.ClientSession = app.state.session
        first = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": KEEP_KV}
        first.pop("stream_options", None)
        async with session.post(prefill + request.url.path, json=first) as answer:
            handoff = (await answer.json())["kv_transfer_params"]
        second = body | {"kv_transfer_params": handoff}
        answer = await session.post(decode + request.url.path, json=second)
        if body.get("stream"):
            return StreamingResponse(answer.content.iter_any(), media_type="text/event-stream")
        async with answer:
            return Response(await answer.read(), answer.status, media_type="application/json")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True)
    parser.add_argument("--decode", required=True)
    arguments = parser.parse_args()
    uvicorn.run(
        proxy(arguments.prefill, arguments.decode), port=arguments.port, log_level="warning", access_log=False
    )
