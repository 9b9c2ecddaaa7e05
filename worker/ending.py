"""`POST /v1/baton/end` asks for this, on vLLM: requests end, and nothing that was made is lost. And
`POST /v1/baton/begun` whether anything was made.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.background import BackgroundTask

from orchestrator.wire.info import BEGUN_PATH, END_PATH, Begun, EndRequest

ENGINE_KEY = "baton_engine"  # in the application's state: an engine whose requests `end` can end

# vLLM's names for a leg, made of what its `x-request-id` says; a completion's has the number of the prompt, a
# response's that of the turn (of several, when vLLM itself calls tools, the first).
_NAMES = ("chatcmpl-{}", "cmpl-{}-0", "{}_0")

# What the engine has said is handed out by a task of its own, in slices. vLLM's `pause_generation` waits as
# long for it.
_HANDED_OUT_S = 0.02


def add_route(app: FastAPI) -> None:
    app.add_api_route(END_PATH, _end, methods=["POST"], include_in_schema=False)
    app.add_api_route(BEGUN_PATH, _begun, methods=["POST"], include_in_schema=False)


def can_end(engine: Any) -> bool:
    """Tell whether the engine is built as `end` takes it to be: vLLM's V1 engine behind an API server is."""
    return hasattr(getattr(engine, "output_processor", None), "external_req_ids") and hasattr(
        getattr(engine, "engine_core", None), "abort_requests_async"
    )


async def end(engine: Any, request_id: str) -> None:
    """End a request that still runs; no effect on one that has ended, or that the engine does not have yet.

    `AsyncLLM.abort` alone forgets a request here before the engine does, so that an answer on its way between
    the two is dropped. So the engine is told first. What it answers to the question that follows comes behind
    all that it had made; what is still open then is ended for good.
    """
    names = [name.format(request_id) for name in _NAMES]
    running = _running(engine, names)
    if not running:
        return
    await engine.engine_core.abort_requests_async(running)
    await engine.is_sleeping()
    await asyncio.sleep(_HANDED_OUT_S)
    await engine.abort(names)


def has_begun(engine: Any, request_id: str) -> bool:
    """Tell whether the engine has made a token of a request; False if there is no such request any more."""
    states = engine.output_processor.request_states
    names = [name.format(request_id) for name in _NAMES]
    return any(each in states and not states[each].is_prefilling for each in _running(engine, names))


def _running(engine: Any, names: list[str]) -> list[str]:
    """Return the engine's own names of the requests that still run."""
    known = engine.output_processor.external_req_ids
    return [each for name in names for each in known.get(name, ())]


async def _end(request: Request) -> Response:
    engine, asked = await _asked(request)
    return Response(status_code=202, background=BackgroundTask(end, engine, asked))


async def _begun(request: Request) -> Response:
    engine, asked = await _asked(request)
    content = msgspec.json.encode(Begun(has_begun(engine, asked)))
    return Response(content, media_type="application/json")


async def _asked(request: Request) -> tuple[Any, str]:
    """Return the engine, and the id of the request that is meant. Raises `HTTPException`."""
    engine = getattr(request.app.state, ENGINE_KEY, None)
    if engine is None:
        raise HTTPException(404, "this server does not know its engine's requests")
    try:
        return engine, msgspec.json.decode(await request.body(), type=EndRequest).request_id
    except msgspec.MsgspecError as error:
        raise HTTPException(400, str(error)) from error
