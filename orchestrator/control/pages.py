"""All pages share this: keys, request ids, the place where errors become answers, and common answers."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator import __version__
from orchestrator.api.messages import PATH as MESSAGES
from orchestrator.api.messages import error_body as messages_error
from orchestrator.compiled import is_compiled
from orchestrator.config.keys import ANTHROPICS, BEARER
from orchestrator.config.keys import Scope as KeyScope
from orchestrator.control.state import Guarding
from orchestrator.errors import BatonError, ClientError, MethodNotAllowed, NotFound
from orchestrator.http.ids import REQUEST_ID_HEADER, request_id_from

HTTP_PARSER = "httptools"  # what `http/reader.py` is built on

Check = Callable[[str, Headers], None]  # of a method and the headers
IsOpen = Callable[[Scope], bool]  # of an ASGI scope: it needs no key
ScopeOf = Callable[[str], KeyScope]  # of a path: what a key must be for
MAX_FIELD: Final = 100  # characters of a field's name, in an error
KEY_NAME = "baton.key"  # in the ASGI scope: the name of the key, if one was asked for
OF_RUN = "baton.run"  # there, too: true if `baton up` asks, which has started this process

# Anthropic's SDKs ask for these, with their own header field for keys.
_FOR_ANTHROPICS: Final = ("/v1/models", MESSAGES)
_log = logging.getLogger("baton.control")


class _Rest(Convertor[str]):
    """All that is left of a path is the parameter `{name:rest}`; Starlette's `path` takes no line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _Rest())


def add_page(
    app: FastAPI, path: str, page: Callable[..., Awaitable[Response]], description: str, tag: str
) -> None:
    app.add_api_route(path, page, methods=["GET"], description=description, tags=[tag])
    app.add_api_route(path, page, methods=["HEAD"], include_in_schema=False)


def guarded(
    app: FastAPI,
    state: Guarding,
    is_open: IsOpen,
    check: Check | None = None,
    scope_of: ScopeOf = lambda path: "infer",
    run_key: str | None = None,
) -> FastAPI:
    """Put what all pages share around `app`. `check` raises a `BatonError` for requests that it refuses.

    Where there are keys, one with the scope that `scope_of` names is needed, but for what `is_open`; or
    `run_key`.
    """
    app.add_middleware(_Guard, state=state, is_open=is_open, check=check, scope_of=scope_of, run_key=run_key)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    return app


class _Guard:
    """This ASGI middleware gives request ids, checks API keys, and turns errors into answers."""

    def __init__(
        self,
        app: ASGIApp,
        state: Guarding,
        is_open: IsOpen,
        check: Check | None,
        scope_of: ScopeOf,
        run_key: str | None,
    ) -> None:
        self._app = app
        self._run_key = None if run_key is None else b"Bearer " + run_key.encode()
        self._check = check
        self._keys = state.keys
        self._ids = state.ids
        self._is_open = is_open
        self._scope_of = scope_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _without_last_slash(scope)
        request_id = request_id_from(scope["headers"], self._ids)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]
            await send(message)

        try:
            if self._check is not None:
                self._check(scope["method"], Headers(scope=scope))
            self._check_key(scope)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await _answer_to(error, request_id, scope["path"])(scope, receive, send_with_id)

    def _check_key(self, scope: Scope) -> None:
        if self._run_key is not None and _is_same(authorization_of(scope), self._run_key):
            scope[OF_RUN] = True
            return
        if self._keys is None or self._is_open(scope):
            return
        takes_both = scope["path"].startswith(_FOR_ANTHROPICS)
        authorization = authorization_of(scope)
        if authorization is None and takes_both:
            given = [value for name, value in scope["headers"] if name == b"x-api-key"]
            authorization = b"Bearer " + given[-1] if given else None
        wanted = ANTHROPICS if takes_both else BEARER
        scope[KEY_NAME] = self._keys.check(authorization, wanted, scope=self._scope_of(scope["path"]))


def _is_same(given: bytes | None, wanted: bytes) -> bool:
    return given is not None and hmac.compare_digest(given, wanted)


def _without_last_slash(scope: Scope) -> Scope:
    """Serve `/path/` as `/path`. To redirect would cost clients a request, and some of them the body."""
    path = scope["path"]
    return {**scope, "path": path[:-1]} if len(path) > 1 and path.endswith("/") else scope


def _answer_to(error: Exception, request_id: str, path: str) -> Response:
    if isinstance(error, BatonError):
        return _error_response(error, path)
    _log.error("request %s failed", request_id, exc_info=error)  # a bug of ours
    return _error_response(BatonError("internal error"), path)


def _error_response(error: BatonError, path: str) -> Response:
    is_anthropics = path.startswith(MESSAGES)  # a path below it that nobody serves
    response = Response(messages_error(error) if is_anthropics else error.body(), error.status)
    response.raw_headers.extend(error.headers())
    return response


def authorization_of(scope: Scope) -> bytes | None:
    """Return the header that carries the key; of several, the last."""
    values: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
    return values[-1] if values else None


def who_asks(scope: Scope) -> str:
    """Return who sent a request, for the log: the name of the key, if there are keys, and the address."""
    host, *_ = scope.get("client") or ("an unknown address",)
    if scope.get(OF_RUN):
        return f"the user of `baton up` at {host}"
    key = scope.get(KEY_NAME)
    return f"{f'key {key}' if key else 'somebody without a key'} at {host}"


async def _http_error(request: Request, error: Exception) -> Response:
    """Turn what the router raises, 404 and 405, into an error of ours."""
    if not isinstance(error, HTTPException):  # it is registered for nothing else
        raise error
    response = _error_response(_translated(error, request), request.url.path)
    response.status_code = error.status_code
    return response


def _translated(error: HTTPException, request: Request) -> BatonError:
    if error.status_code == 404:
        return NotFound(f"no such path: {request.method} {request.url.path[:200]}")
    if error.status_code == 405:
        allow = (error.headers or {}).get("allow", "GET")
        return MethodNotAllowed(f"{request.method} is not allowed here", allow=allow)
    return ClientError(str(error.detail))


async def _not_valid(request: Request, error: Exception) -> Response:
    """Turn what FastAPI finds wrong with a query or a body into an error of ours, too."""
    if not isinstance(error, RequestValidationError):  # it is registered for nothing else
        raise error
    return _error_response(mistaken(error), request.url.path)


def mistaken(error: RequestValidationError | ValidationError) -> ClientError:
    """Return the error that tells all mistakes in a query or a body, and the first field that has one."""
    found = [(".".join(map(str, mistake["loc"])), str(mistake["msg"])) for mistake in error.errors()]
    said = (f"{field}: {what.removeprefix('Value error, ')}".removeprefix(": ") for field, what in found)
    return ClientError("; ".join(said), param=found[0][0][:MAX_FIELD] or None)


def as_json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def build_info(transport: str) -> dict[str, str]:
    """Return what was chosen for this process. Call this on its event loop."""
    return {
        "version": __version__,
        "form": "compiled" if is_compiled() else "pure",
        "transport": transport,
        "event_loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
        "http_parser": HTTP_PARSER,
    }
