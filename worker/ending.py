"""`POST /v1/baton/end` asks for this, on vLLM: requests end, and nothing that was made is lost. And
`POST /v1/baton/begun` whether anything was made.

A leg is found by its name (`orchestrator/wire/info.py`), not by the engine's for it: that is made of what the
client calls its request, and several clients may call theirs alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.wire.info import BEGUN_PATH, END_PATH, LEG_HEADER, Begun, EndRequest

ENGINE_KEY = "baton_engine"  # in the application's state: an engine whose requests `end` can end
LEGS_KEY = "baton_legs"  # there as well: the `Running` legs

Running = dict[str, list[str]]  # by the name of a leg: what the engine calls its requests

_NAME_HEADERS = (LEG_HEADER.lower().encode(), b"x-request-id")  # the first that is there has the name
# Of the leg that is being served: a list that the engine's names for its requests are added to.
_requests: ContextVar[list[str] | None] = ContextVar("baton_requests", default=None)

# What the engine has said is handed out by a task of its own, in slices. vLLM's `pause_generation` waits as
# long for it.
_HANDED_OUT_S = 0.02


class LegNames:
    """This middleware knows which legs are being served, and what their requests are called in the engine."""

    def __init__(self, app: ASGIApp, running: Running) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _name_of(scope["headers"]) if scope["type"] == "http" else None
        if name is None:
            await self._app(scope, receive, send)
            return
        requests: list[str] = []
        self._running[name] = requests
        token = _requests.set(requests)
        try:
            await self._app(scope, receive, send)
        finally:
            _requests.reset(token)
            if self._running.get(name) is requests:  # not of one that was sent again meanwhile
                del self._running[name]


def _name_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    given = dict(headers)
    return next((given[each].decode("latin-1") for each in _NAME_HEADERS if each in given), None)


def follow(engine: Any) -> None:
    """Note from now on which requests the engine is given for which leg. It must be one that `can_end`."""
    processor = engine.output_processor
    add = processor.add_request

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        add(request, *args, **kwargs)
        requests = _requests.get()
        if requests is not None:
            requests.append(request.request_id)

    processor.add_request = add_request


def add_route(app: FastAPI) -> None:
    running: Running = {}
    setattr(app.state, LEGS_KEY, running)
    app.add_middleware(LegNames, running=running)
    app.add_api_route(END_PATH, _end, methods=["POST"], include_in_schema=False)
    app.add_api_route(BEGUN_PATH, _begun, methods=["POST"], include_in_schema=False)


def can_end(engine: Any) -> bool:
    """Tell whether the engine is built as `end` takes it to be: vLLM's V1 engine behind an API server is."""
    processor = getattr(engine, "output_processor", None)
    return (
        hasattr(processor, "add_request")
        and hasattr(processor, "request_states")
        and hasattr(getattr(engine, "engine_core", None), "abort_requests_async")
    )


async def end(engine: Any, requests: Iterable[str]) -> None:
    """End these of the engine's requests that still run; no effect on those that have ended.

    `AsyncLLM.abort` alone forgets a request here before the engine does, so that an answer on its way between
    the two is dropped. So the engine is told first. What it answers to the question that follows comes behind
    all that it had made; what is still open then is ended for good.
    """
    running = _running(engine, requests)
    if not running:
        return
    await engine.engine_core.abort_requests_async(running)
    await engine.is_sleeping()
    await asyncio.sleep(_HANDED_OUT_S)
    await engine.abort(_running(engine, running), internal=True)


def has_begun(engine: Any, requests: Iterable[str]) -> bool:
    """Tell whether the engine has made a token of one of these requests; False if none of them runs."""
    states = engine.output_processor.request_states
    return any(not states[each].is_prefilling for each in _running(engine, requests))


def _running(engine: Any, requests: Iterable[str]) -> list[str]:
    """Return those of the engine's requests that still run."""
    states = engine.output_processor.request_states
    return [each for each in requests if each in states]


async def _end(request: Request) -> Response:
    engine, asked = await _asked(request)
    return Response(status_code=202, background=BackgroundTask(end, engine, asked))


async def _begun(request: Request) -> Response:
    engine, asked = await _asked(request)
    content = msgspec.json.encode(Begun(has_begun(engine, asked)))
    return Response(content, media_type="application/json")


async def _asked(request: Request) -> tuple[Any, list[str]]:
    """Return the engine, and its names of the requests of the leg that is meant: none if that is not being
    served. Raises `HTTPException`.
    """
    state = request.app.state
    engine = getattr(state, ENGINE_KEY, None)
    if engine is None:
        raise HTTPException(404, "this server does not know its engine's requests")
    try:
        name = msgspec.json.decode(await request.body(), type=EndRequest).request_id
        return engine, getattr(state, LEGS_KEY).get(name, [])
    except msgspec.MsgspecError as error:
        raise HTTPException(400, str(error)) from error
