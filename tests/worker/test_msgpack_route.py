from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from tests.orchestrator.wire.documents import keys, values
from tests.worker.asgi import JSON_TYPE, MSGPACK, post
from tests.worker.hostile import BAD_BODIES
from worker.msgpack_route import MsgpackRequest, MsgpackRoute, OrjsonRoute, route_class

encode = msgspec.msgpack.encode


class Chat(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = None


def application(route: type[APIRoute]) -> FastAPI:
    """Answers with what its endpoints see, in JSON."""
    router = APIRouter(route_class=route)

    @router.post("/document")
    async def document(document: Annotated[dict[str, Any], Body()]) -> Response:
        return seen(document)

    @router.post("/chat")
    async def chat(chat: Chat) -> Response:
        return seen(chat.model_dump())

    @router.post("/again", dependencies=[Depends(reads_the_body)])
    async def again(document: Annotated[dict[str, Any], Body()], request: Request) -> Response:
        return seen([document, await request.json(), len(await request.body())])

    @router.post("/by-itself")
    async def by_itself(request: Request) -> Response:
        return seen(await request.json())

    app = FastAPI()
    app.include_router(router)
    return app


async def reads_the_body(request: Request) -> None:
    assert await request.json() is await request.json()
    assert await request.body()


def seen(value: Any) -> Response:
    return Response(json.dumps(value))


STOCK, ORJSON, APP = application(APIRoute), application(OrjsonRoute), application(MsgpackRoute)


# --- msgpack --------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.dictionaries(keys, values, max_size=5))
def test_an_endpoint_sees_the_same_document_in_every_encoding(document: dict[str, Any]) -> None:
    as_json = json.dumps(document).encode()
    expected = post(STOCK, "/document", as_json)
    assert expected.status == 200
    assert post(ORJSON, "/document", as_json) == expected
    assert post(APP, "/document", as_json) == expected
    assert post(APP, "/document", encode(document), MSGPACK) == expected


def test_a_body_in_several_chunks_is_one_body() -> None:
    body = encode({"model": "m", "more": ["x"] * 9})
    reply = post(APP, "/chat", (body[i : i + 1] for i in range(len(body))), MSGPACK)
    assert reply.json() == {"model": "m", "max_tokens": None, "more": ["x"] * 9}


def test_models_validate_msgpack_like_json() -> None:
    wrong = {"model": "m", "max_tokens": "many"}
    as_json = post(APP, "/chat", json.dumps(wrong).encode())
    assert as_json.status == 422
    assert post(APP, "/chat", encode(wrong), MSGPACK) == as_json


@pytest.mark.parametrize("flag", ["0", "", "true"])
def test_only_the_flag_makes_a_body_msgpack(flag: str) -> None:
    assert post(APP, "/document", b'{"a": 1}', JSON_TYPE | {"x-msgpack": flag}).json() == {"a": 1}
    assert post(APP, "/document", encode({"a": 1}), JSON_TYPE | {"x-msgpack": flag}).status == 400


@pytest.mark.parametrize(("body", "headers"), [(encode({"a": 1}), MSGPACK), (b'{"a": 1}', JSON_TYPE)])
def test_a_body_can_be_read_again(body: bytes, headers: dict[str, str]) -> None:
    assert post(APP, "/again", body, headers).json() == [{"a": 1}, {"a": 1}, len(body)]


@pytest.mark.parametrize("path", ["/chat", "/by-itself"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_hostile_bodies_are_answered_400(name: str, path: str) -> None:
    reply = post(APP, path, BAD_BODIES[name](), MSGPACK)
    assert reply.status == 400
    assert reply.json()["detail"].startswith("msgpack body refused: ")


def test_a_missing_body_is_answered_as_in_a_stock_application() -> None:
    assert post(APP, "/chat", b"", MSGPACK) == post(STOCK, "/chat", b"")
    assert post(APP, "/by-itself", b"", MSGPACK).status == 400


def test_reading_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MsgpackRequest, "max_msgpack_bytes", 1000)
    at_the_limit = encode({"a": "x" * (1000 - 6)})
    assert len(at_the_limit) == 1000
    assert post(APP, "/document", at_the_limit, MSGPACK).status == 200
    reply = post(APP, "/document", [b"x" * 400] * 100, MSGPACK)
    assert (reply.status, reply.chunks_read) == (413, 3)


def test_an_exception_handler_can_read_the_body_that_failed() -> None:
    app = application(MsgpackRoute)

    @app.exception_handler(HTTPException)
    async def handle(request: Request, error: HTTPException) -> Response:
        return Response(await request.body(), error.status_code)

    reply = post(app, "/document", b"\xc1", MSGPACK)
    assert (reply.status, reply.body) == (400, b"\xc1")


def test_routers_of_all_kinds_live_in_one_application() -> None:
    app = FastAPI()
    for transport in ("json", "orjson", "msgpack"):
        app.mount(f"/{transport}", application(route_class(transport)))
        assert post(app, f"/{transport}/document", b'{"a": 1}').json() == {"a": 1}
    assert post(app, "/msgpack/document", encode({"a": 1}), MSGPACK).json() == {"a": 1}
    assert post(app, "/orjson/document", encode({"a": 1}), MSGPACK).status == 400
    assert post(app, "/json/document", encode({"a": 1}), MSGPACK).status == 400


def test_json_is_the_stock_route() -> None:
    assert route_class("json") is APIRoute
    with pytest.raises(KeyError):
        route_class("xml")


# --- orjson ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/document", "/by-itself"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN, "b": [Infinity, -Infinity]}',
        b'{"a": 1e999}',
        b'{"a": 18446744073709551615, "b": -9223372036854775808, "c": -0, "d": -0.0}',
        b'{"a": 18446744073709551616, "b": [1, -9223372036854775809], "c": [{"d": 1e30}, 1e30]}',
        b'[{"a": [[], [2.5, {"b": 340282366920938463463374607431768211456}]]}]',
        b'{"a": "\\ud800"}',
        b'{"a": "\\ud83d\\ude00"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "é"}'.encode("utf-16"),
        b'{"a": 1, "a": 2}',
        b' {"a": 1}\n',
        b'{"a": 1}x',
        b'{"a": 1,}',
        b'{"a": "\x01"}',
        b'{"a": ',
        b"{",
        b" ",
        b'"text"',
        b"null",
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_orjson_takes_and_refuses_what_a_stock_application_does(path: str, body: bytes) -> None:
    def answer(app: FastAPI) -> Any:
        try:
            return post(app, path, body)
        except (ValueError, RecursionError) as error:  # /by-itself lets what json() raises through
            return type(error)

    assert answer(ORJSON) == answer(STOCK)


def test_integers_of_more_than_64_bits_are_integers_with_orjson() -> None:
    for body in (b'{"a": 18446744073709551616}', b'{"a": {"b": [[18446744073709551616]]}}'):
        assert b"18446744073709551616" in post(ORJSON, "/document", body).body


@pytest.mark.parametrize("app", [ORJSON, APP])
def test_json_bodies_can_be_read_again(app: FastAPI) -> None:
    assert post(app, "/again", b'{"a": 1}').json() == [{"a": 1}, {"a": 1}, 8]
