"""The route classes behind `BATON_TRANSPORT` say how a FastAPI endpoint's JSON body is parsed.

Use one on any router, as in `APIRouter(route_class=MsgpackRoute)`; endpoints, models and dependencies stay as
they are. A msgpack body is flagged `X-Msgpack: 1` and keeps `Content-Type: application/json`: FastAPI asks
`Request.json()` for a body of that type only, and hands any other to pydantic as bytes.

An application whose state has `token_ids.Limits` also takes a prompt's token ids packed, and gives them so.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, ClassVar

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from orchestrator.wire.info import DOCUMENT_REFUSED, MSGPACK_HEADER, TOKEN_IDS_HEADER, TokenIdsForm
from worker import msgpack_body, token_ids
from worker.token_ids import BadTokenIds, Limits, RequestedIds

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def route_class(transport: str) -> type[APIRoute]:
    """Return the route class for a value of `BATON_TRANSPORT`; for `json` it is FastAPI's own. Raises
    `KeyError`.
    """
    return {"json": APIRoute, "orjson": OrjsonRoute, "msgpack": MsgpackRoute}[transport]


class _IdsRefused(HTTPException):
    """Token ids were refused: FastAPI lets no other error through that happens while a body is read."""


class _Request(Request):
    """`json()` finds lists where the body has packed token ids."""

    gives: ClassVar[tuple[TokenIdsForm, ...]] = ()  # the packed forms that the answer may have

    @property
    def limits(self) -> Limits | None:
        limits: Limits | None = getattr(self.app.state, token_ids.LIMITS_KEY, None)
        return limits

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = self._unpacked(await self._parse())
        return self._json

    async def _parse(self) -> Any:
        raise NotImplementedError

    def _unpacked(self, document: Any) -> Any:
        if self.limits is not None:
            path = self.scope["path"]
            is_completion = path.endswith("/completions") and not path.endswith("/chat/completions")
            try:
                token_ids.unpack_in(document, self.limits, is_completion=is_completion)
            except BadTokenIds as error:
                raise _IdsRefused(400, str(error)) from error
        return document


class MsgpackRequest(_Request):
    """`json()` decodes a body that is flagged as msgpack and parses any other as Starlette does.

    A flagged body that cannot be taken raises FastAPI's `HTTPException`, 400 or 413 with the reason: FastAPI
    and vLLM each make their own error object of it, also when an endpoint calls `json()` by itself.
    """

    gives = ("base64", "bin")
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
                    raise HTTPException(413, f"{DOCUMENT_REFUSED}: more than {self.max_msgpack_bytes} bytes")
                yield chunk

    async def _parse(self) -> Any:
        body = await self.body()
        return _decode(body, takes_ids=self.limits is not None) if self.is_msgpack else json.loads(body)


def _decode(body: bytes, *, takes_ids: bool) -> dict[str, Any]:
    try:
        return msgpack_body.decode(body, takes_ids=takes_ids)
    except msgpack_body.BadMsgpack as error:
        raise HTTPException(400, f"{DOCUMENT_REFUSED}: {error}") from error


class OrjsonRequest(_Request):
    """`json()` parses with orjson, and again with the standard library what orjson refuses, or may have read
    otherwise: an integer of more than 64 bits becomes a float.

    So all that a stock worker takes is taken (NaN, lone surrogates, a BOM, other UTFs), and its error for bad
    JSON is the stock one. One difference remains: nesting is taken to 1,024 levels where Python 3.11's own
    parser ends at about 950.
    """

    gives = ("base64",)

    async def _parse(self) -> Any:
        body = await self.body()
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return json.loads(body)
        return json.loads(body) if _has_large_float(document) else document


def _has_large_float(document: object) -> bool:
    """Tell whether there is a float that may be an integer of more than 64 bits.

    Beside parsing it takes a third of the time for a long chat, and 0.8 for a list of token ids, which our
    workers are sent packed; looking for digits in the bytes takes several times that.
    """
    pending = [document]
    while pending:
        values = pending.pop()
        inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
        kinds = set(map(type, inner))
        if float in kinds and any(isinstance(value, float) and abs(value) >= 2.0**63 for value in inner):
            return True
        if dict in kinds or list in kinds:
            pending += [value for value in inner if isinstance(value, dict | list)]
    return False


class MsgpackRoute(APIRoute):
    """It hands its endpoint a `MsgpackRequest`."""

    def get_route_handler(self) -> _Handler:
        return _handing(MsgpackRequest, super().get_route_handler())


class OrjsonRoute(APIRoute):
    """It hands its endpoint an `OrjsonRequest`."""

    def get_route_handler(self) -> _Handler:
        return _handing(OrjsonRequest, super().get_route_handler())


def _handing(kind: type[_Request], handler: _Handler) -> _Handler:
    async def handle(request: Request) -> Response:
        seen = _seen_as(kind, request)
        wanted = _wanted(seen)
        try:
            response = await handler(seen)
        except _IdsRefused as refused:
            return _refusal(refused)
        if wanted is not None and wanted.packed is not None:
            _write_ids(response, wanted.form, wanted.packed)
        return response

    return handle


def _wanted(request: _Request) -> RequestedIds | None:
    """Leave what the request asks for in its state, for whoever makes the answer."""
    asked = request.headers.get(TOKEN_IDS_HEADER)
    form = next((form for form in request.gives if form == asked), None)
    if form is None or request.limits is None:
        return None
    wanted = RequestedIds(form)
    setattr(request.state, token_ids.WANTED_KEY, wanted)
    return wanted


def _write_ids(response: Response, form: TokenIdsForm, packed: bytes) -> None:
    """Write the ids in place: the status, the other headers and the background work are the endpoint's."""
    document = orjson.loads(response.body)
    response.body, content_type = token_ids.encode_answer(document, form, packed)
    response.headers["content-type"] = content_type
    response.headers["content-length"] = str(len(response.body))


def _refusal(refused: _IdsRefused) -> Response:
    # The type is that of what vLLM refuses before it knows of a hand-off.
    error = {"message": refused.detail, "type": "Bad Request", "param": token_ids.PLACE, "code": 400}
    return JSONResponse({"error": error}, 400)


def _seen_as(kind: type[_Request], request: Request) -> _Request:
    """Return the same request in another class, with one state for both.

    Exception handlers are given the first object. With a state of its own it would wait for a body that the
    second has already consumed, until the client leaves.
    """
    seen = kind(request.scope, request.receive)
    seen.__dict__ = request.__dict__
    return seen
