"""The control plane: health, models, docs, and on a listener of its own metrics and the admin API.

FastAPI serves every path that the data plane does not. Endpoints return `Response` objects directly; errors
look like OpenAI's here too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator import __version__
from orchestrator.api.openapi import describe_data_plane
from orchestrator.compiled import is_compiled
from orchestrator.config.keys import KeyRing
from orchestrator.config.options import Config
from orchestrator.control.admin_workers import WorkerPages, refuse_other_sites
from orchestrator.control.metrics import (
    CONTENT_TYPE,
    BatonCollector,
    ProcessEnd,
    ProcessStatus,
    Sources,
    process_collector,
    render,
)
from orchestrator.errors import (
    BatonError,
    ClientError,
    MethodNotAllowed,
    NotFound,
    UnknownModel,
)
from orchestrator.http.ids import REQUEST_ID_HEADER, IdSource, request_id_from
from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.transport.base import UpstreamStats
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus

HTTP_PARSER = "httptools"  # what `http/connection.py` is built on
# Answered without a key: load balancers and supervisors have none.
OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
# A probe brings a worker back within seconds.
READY_RETRY_AFTER_S = 2

INDEX = """\
Baton admin

/metrics
/admin/processes
/admin/workers                      POST {"model", "role", "url"} adds a worker
/admin/workers/{name}               DELETE drains and removes it
/admin/workers/{name}/drain         POST: no new legs
/admin/workers/{name}/undrain       POST: takes legs again
/admin/reload                       POST: read the config file again
"""

Reload = Callable[[], Awaitable[Sequence[str]]]

_log = logging.getLogger("baton.control")


class Guarding(Protocol):
    """What every listener needs to answer at all."""

    @property
    def ids(self) -> IdSource: ...

    @property
    def keys(self) -> KeyRing | None:
        """None: everybody may ask."""
        ...


class State(Guarding, Protocol):
    """What the public pages may see of the process that answers. `app.py` provides it."""

    @property
    def config(self) -> Config: ...

    @property
    def index(self) -> int:
        """Of this process among those that serve; 0 if it is the only one."""
        ...

    @property
    def telemetry(self) -> Telemetry: ...

    @property
    def lag(self) -> LoopLagMonitor: ...

    @property
    def transport(self) -> str:
        """json, orjson or msgpack."""
        ...

    @property
    def started(self) -> float:
        """`time.time()` when the orchestrator started."""
        ...

    @property
    def is_draining(self) -> bool:
        """The process is about to end."""
        ...

    def workers(self) -> Sequence[WorkerStatus]: ...

    def model_problems(self) -> Mapping[str, str | None]:
        """For every model: None if a whole path exists, else why not."""
        ...


class AdminState(Guarding, Protocol):
    """What the admin pages may see: of all processes together. `app.py` or the supervisor provides it."""

    @property
    def config(self) -> Config: ...

    @property
    def transport(self) -> str: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def registry(self) -> Registry:
        """The one that decides who serves."""
        ...

    def counts(self) -> Sequence[int]:
        """One row."""
        ...

    def workers(self) -> Sequence[WorkerStatus]: ...

    def upstream(self) -> UpstreamStats: ...

    def processes(self) -> Sequence[ProcessStatus]: ...

    def ends(self) -> Mapping[ProcessEnd, int]: ...


def control_app(state: State) -> FastAPI:
    """Health, readiness, version, models and docs.

    `/docs` loads its page from FastAPI's default CDN; without internet use `/openapi.json`.
    """
    app = _ControlPlane(
        title="Baton",
        version=__version__,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    pages = _Pages(state)
    _add(app, "/health", pages.health, "The process is up; `?verbose` adds figures.", "health")
    _add(app, "/ready", pages.ready, "200 if every model can be served, else 503 with the reasons.", "health")
    _add(app, "/version", pages.version, "Baton's version.", "health")
    _add(app, "/v1/models", pages.models, "The models that requests can name.", "models")
    _add(app, "/v1/models/{name:path}", pages.model, "One model.", "models")
    return _guarded(app, state, OPEN_PATHS)


def admin_app(state: AdminState, reload: Reload | None = None) -> FastAPI:
    """Metrics and the admin API, for a listener that clients do not reach.

    `reload` reads the config again; it returns what has changed, or raises a `BatonError`.
    """
    app = FastAPI(
        title="Baton admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    pages = _AdminPages(state)
    _add(app, "/", pages.index, "This list.", "admin")
    _add(app, "/metrics", pages.metrics, "Prometheus text format.", "admin")
    _add_worker_pages(app, WorkerPages(state.registry))
    _add(app, "/admin/processes", pages.processes, "The processes that serve requests.", "admin")
    if reload is not None:
        app.add_api_route("/admin/reload", _reload_page(reload), methods=["POST"])
    return _guarded(app, state, frozenset())


def _reload_page(reload: Reload) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        refuse_other_sites(request.headers)
        return _json({"changed": await reload()})

    return page


def _add_worker_pages(app: FastAPI, pages: WorkerPages) -> None:
    path, one = "/admin/workers", "/admin/workers/{name:path}"
    _add(app, path, pages.all, "All workers and their states.", "admin")
    app.add_api_route(path, pages.add, methods=["POST"])
    app.add_api_route(f"{one}/drain", pages.drain, methods=["POST"])
    app.add_api_route(f"{one}/undrain", pages.undrain, methods=["POST"])
    app.add_api_route(one, pages.remove, methods=["DELETE"])


def _add(
    app: FastAPI, path: str, page: Callable[..., Awaitable[Response]], description: str, tag: str
) -> None:
    app.add_api_route(path, page, methods=["GET"], description=description, tags=[tag])
    app.add_api_route(path, page, methods=["HEAD"], include_in_schema=False)


def _guarded(app: FastAPI, state: Guarding, open_paths: frozenset[str]) -> FastAPI:
    app.add_middleware(_Gate, state=state, open_paths=open_paths)
    app.add_exception_handler(HTTPException, _http_error)
    return app


class _ControlPlane(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            describe_data_plane(super().openapi())
        return super().openapi()


# --- around every page --------------------------------------------------------------------------


class _Gate:
    """ASGI middleware: request ids, API keys, and the place where errors become answers."""

    def __init__(self, app: ASGIApp, state: Guarding, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = state.keys
        self._ids = state.ids
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_from(scope["headers"], self._ids)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await _answer_to(error, request_id)(scope, receive, send_with_id)

    def _check_key(self, scope: Scope) -> None:
        if self._keys is None or scope["path"] in self._open_paths:
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        self._keys.check(values[-1] if values else None)


def _answer_to(error: Exception, request_id: str) -> Response:
    if isinstance(error, BatonError):
        return _error_response(error)
    _log.error("request %s failed", request_id, exc_info=error)  # a bug of ours
    return _error_response(BatonError("internal error"))


def _error_response(error: BatonError) -> Response:
    response = Response(error.body(), error.status)
    response.raw_headers.extend(error.headers())
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router raises: 404 and 405."""
    if not isinstance(error, HTTPException):  # it is registered for nothing else
        raise error
    response = _error_response(_translated(error, request))
    response.status_code = error.status_code
    return response


def _translated(error: HTTPException, request: Request) -> BatonError:
    if error.status_code == 404:
        return NotFound(f"no such path: {request.method} {request.url.path[:200]}")
    if error.status_code == 405:
        allow = (error.headers or {}).get("allow", "GET")
        return MethodNotAllowed(f"{request.method} is not allowed here", allow=allow)
    return ClientError(str(error.detail))


# --- pages --------------------------------------------------------------------------------------


class _Pages:
    def __init__(self, state: State) -> None:
        self._state = state

    async def health(self, request: Request) -> Response:
        is_verbose = "verbose" in request.query_params
        return _json({"status": "ok"} | (_figures(self._state) if is_verbose else {}))

    async def ready(self) -> Response:
        problems = self._state.model_problems()
        is_draining = self._state.is_draining
        if not is_draining and all(problem is None for problem in problems.values()):
            return _json({"status": "ready", "models": problems})
        status = "draining" if is_draining else "not ready"
        answer = _json({"status": status, "models": problems}, 503)
        answer.headers["retry-after"] = str(READY_RETRY_AFTER_S)
        return answer

    async def version(self) -> Response:
        return _json({"version": __version__})

    async def models(self) -> Response:
        names = [model.name for model in self._state.config.models]
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, name: str) -> Response:
        names = [model.name for model in self._state.config.models]
        if name not in names:
            raise UnknownModel(f"no model {name[:200]!r}; there is {', '.join(names)}", param="model")
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._state.started),
            "owned_by": "baton",
            "max_model_len": _max_model_len(self._state.workers(), name),
        }


class _AdminPages:
    def __init__(self, state: AdminState) -> None:
        self._state = state
        sources = Sources(
            layout=state.layout,
            counts=state.counts,
            workers=state.workers,
            upstream=state.upstream,
            processes=state.processes,
            ends=state.ends,
            info=lambda: _build(state.transport),
        )
        self._collectors = (BatonCollector(state.config, sources), process_collector())

    async def index(self) -> Response:
        return PlainTextResponse(INDEX)

    async def metrics(self) -> Response:
        return Response(await render(self._collectors), headers={"content-type": CONTENT_TYPE})

    async def processes(self) -> Response:
        return Response(msgspec.json.encode(self._state.processes()), media_type="application/json")


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _max_model_len(workers: Iterable[WorkerStatus], model: str) -> int | None:
    """What every worker of the model can take, as far as they told."""
    lengths = [w.max_model_len for w in workers if w.address.model == model and w.max_model_len is not None]
    return min(lengths, default=None)


# --- figures ------------------------------------------------------------------------------------


def _build(transport: str) -> dict[str, str]:
    """What was chosen for this process; called on its event loop."""
    return {
        "version": __version__,
        "form": "compiled" if is_compiled() else "pure",
        "transport": transport,
        "event_loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
        "http_parser": HTTP_PARSER,
    }


def _figures(state: State) -> dict[str, object]:
    return {
        **_build(state.transport),
        "process": state.index,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - state.started, 3),
        "rss_bytes": _rss_bytes(),
        "loop_lag_ms": {"last": round(state.lag.last_s * 1e3, 3), "max": round(state.lag.max_s * 1e3, 3)},
        "in_flight": state.telemetry.in_flight,
        "tasks": len(asyncio.all_tasks()),  # one that outlives its request shows here
    }


def _rss_bytes() -> int:
    """Resident memory now; where /proc is missing, its highest value so far."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
