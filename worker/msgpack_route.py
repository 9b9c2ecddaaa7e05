"""The route classes behind `BATON_TRANSPORT`: how a FastAPI endpoint's JSON body is parsed.

Use one on any router, as in `APIRouter(route_class=MsgpackRoute)`; endpoints, models and dependencies stay as
they are. A msgpack body is flagged `X-Msgpack: 1` and keeps `Content-Type: application/json`: FastAPI asks
`Request.json()` for a body of that type only, and hands any other to pydantic as bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, ClassVar

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from orchestrator.wire.info import MSGPACK_HEADER
from worker import msgpack_body

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def route_class(transport: str) -> type[APIRoute]:
    """The route class for a value of `BATON_TRANSPORT`; for `json` it is FastAPI's own. Else `KeyError`."""
    return {"json": APIRoute, "orjson": OrjsonRoute, "msgpack": MsgpackRoute}[transport]


class MsgpackRequest(Request):
    """`json()` decodes a body that is flagged as msgpack and leaves any other to Starlette.

    A flagged body that cannot be taken raises FastAPI's `HTTPException`, 400 or 413 with the reason: FastAPI
    and vLLM each make their own error object of it, also when an endpoint calls `json()` by itself.
    """

    max_msgpack_bytes: ClassVar[int] = 64 * 1024 * 1024  # four times the orchestrator's default limit

    @property
    def is_msgpack(self) -> bool:
        return self.headers.get(MSGPACK_HEADER) == "1"

    def stream(self) -> AsyncGenerator[bytes, None]:
        chunks = super().stream()
        return self._bounded(chunks) if self.is_msgpack else chunks

    async def _bounded(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        received = 0
        async with aclosing(chunks):
            async for chunk in chunks:
                received += len(chunk)
                if received > self.max_msgpack_bytes:
                    raise HTTPException(413, f"a msgpack body may have {self.max_msgpack_bytes} bytes")
                yield chunk

    async def json(self) -> Any:
        if not self.is_msgpack:
            return await super().json()
        if not hasattr(self, "_json"):
            self._json = _decode(await self.body())
        return self._json


def _decode(body: bytes) -> dict[str, Any]:
    try:
        return msgpack_body.decode(body)
    except msgpack_body.BadMsgpack as error:
        raise HTTPException(400, f"msgpack body refused: {error}") from error


class OrjsonRequest(Request):
    """`json()` parses with orjson, and again with the standard library what orjson refuses.

    So all that a stock worker takes is taken (NaN, lone surrogates, a BOM, other UTFs), and its error for bad
    JSON is the stock one. Two differences remain: an integer of more than 64 bits arrives as a float, and
    nesting is taken to 1,024 levels where Python 3.11's own parser ends at about 950.
    """

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = orjson.loads(await self.body())
            except orjson.JSONDecodeError:
                return await super().json()
        return self._json


class MsgpackRoute(APIRoute):
    """Hands its endpoint a `MsgpackRequest`."""

    def get_route_handler(self) -> _Handler:
        return _handing(MsgpackRequest, super().get_route_handler())


class OrjsonRoute(APIRoute):
    """Hands its endpoint an `OrjsonRequest`."""

    def get_route_handler(self) -> _Handler:
        return _handing(OrjsonRequest, super().get_route_handler())


def _handing(kind: type[Request], handler: _Handler) -> _Handler:
    async def handle(request: Request) -> Response:
        return await handler(_seen_as(kind, request))

    return handle


def _seen_as(kind: type[Request], request: Request) -> Request:
    """The same request in another class, with one state for both.

    Exception handlers are given the first object. With a state of its own it would wait for a body that the
    second has already consumed, until the client leaves.
    """
    seen = kind(request.scope, request.receive)
    seen.__dict__ = request.__dict__
    return seen
