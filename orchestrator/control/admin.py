"""The admin listener serves pages for operators: metrics, processes, workers, reload."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from orchestrator.config.keys import Scope
from orchestrator.control.admin_workers import WorkerPages
from orchestrator.control.changes import Changes
from orchestrator.control.event_pages import EventPages
from orchestrator.control.explain import ExplainPage
from orchestrator.control.metrics import CONTENT_TYPE, BatonCollector, Sources, process_collector, render
from orchestrator.control.other_sites import refuse_other_sites
from orchestrator.control.pages import add_page, as_json, build_info, guarded
from orchestrator.control.request_pages import RequestPages
from orchestrator.control.state import AdminState
from orchestrator.control.web_page import WebPage
from orchestrator.errors import BatonError, NotFound

INDEX = """\
Baton admin

/                                   a page for people, in a browser, which needs a key only for its figures
/metrics                            with a key for metrics or admin; all others: admin
/admin/processes
/admin/events                       what has happened of late; ?after=NUMBER, ?kind=KIND, ?follow=1: a stream
/admin/workers                      POST {"model", "role", "url"} adds a worker
/admin/workers/{name}               DELETE drains and removes it
/admin/workers/{name}/drain         POST: no new legs
/admin/workers/{name}/undrain       POST: takes legs again
/admin/discovery                    the sources that find workers, and what is wrong with what they list
/admin/requests                     of late; ?key= ?model= ?worker= ?failed=1 ?slowest=1 ?slower_than= ?limit=
/admin/requests/{id}                all that became of one
/admin/explain                      POST a request: who would serve it, and why; ?path= is its path
/admin/scaling                      how many workers are wanted, and why
/admin/reload                       POST: read the config file again
"""

Reload = Callable[[], Awaitable[Sequence[str]]]


def admin_app(state: AdminState, reload: Reload | None = None, run_key: str | None = None) -> FastAPI:
    """Return the app of metrics and the admin API, for a listener that clients do not reach.

    `reload` reads the config again; it returns what has changed, or raises a `BatonError`. `run_key` is
    what `baton up` shows, which has started this process: it may do everything, and adds workers of its own.
    """
    app = FastAPI(
        title="Baton admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    pages = _AdminPages(state)
    add_page(app, "/", pages.front, "The page for people; this list for programs.", "admin")
    add_page(app, "/admin", pages.index, "This list.", "admin")
    add_page(app, "/page/{name}", pages.web.file, "What the page loads.", "admin")
    add_page(app, "/metrics", pages.metrics, "Prometheus text format.", "admin")
    changes = Changes(state.events)
    _add_worker_pages(app, WorkerPages(state, changes))
    add_page(app, "/admin/processes", pages.processes, "The processes that serve requests.", "admin")
    add_page(app, "/admin/scaling", pages.scaling, "How many workers are wanted, and why.", "admin")
    add_page(app, "/admin/events", EventPages(state.events).events, "What has happened of late.", "admin")
    add_page(app, "/admin/discovery", pages.discovery, "The sources that find workers.", "admin")
    requests = RequestPages(state)
    add_page(app, "/admin/requests", requests.all, "Requests of late.", "admin")
    add_page(app, "/admin/requests/{name:rest}", requests.one, "What became of one.", "admin")
    app.add_api_route("/admin/explain", ExplainPage(state).explain, methods=["POST"])
    if reload is not None:
        app.add_api_route("/admin/reload", _reload_page(reload, changes), methods=["POST"])
    is_open = pages.web.is_asked_for
    return guarded(app, state, is_open, check=refuse_other_sites, scope_of=_scope_of, run_key=run_key)


def _scope_of(path: str) -> Scope:
    return "metrics" if path == "/metrics" else "admin"


def _reload_page(reload: Reload, changes: Changes) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        try:
            changed = await reload()
        except BatonError as error:
            changes.note(request, "admin.reload_refused", f"the config was refused: {error.message}")
            raise
        changes.note(request, "admin.reload", f"the config was reloaded: {', '.join(changed) or 'no change'}")
        return as_json({"changed": changed})

    return page


def _add_worker_pages(app: FastAPI, pages: WorkerPages) -> None:
    path, one = "/admin/workers", "/admin/workers/{name:rest}"
    add_page(app, path, pages.all, "All workers and their states.", "admin")
    app.add_api_route(path, pages.add, methods=["POST"])
    app.add_api_route(f"{one}/drain", pages.drain, methods=["POST"])
    app.add_api_route(f"{one}/undrain", pages.undrain, methods=["POST"])
    app.add_api_route(one, pages.remove, methods=["DELETE"])


class _AdminPages:
    def __init__(self, state: AdminState) -> None:
        self._state = state
        self.web = WebPage()
        sources = Sources(
            layout=state.layout,
            counts=state.counts,
            workers=state.workers,
            figures=lambda: [(worker, state.watch.figures(worker)) for worker in state.registry.workers],
            upstream=state.upstream,
            processes=state.processes,
            process_ends=state.process_ends,
            info=lambda: build_info(state.transport),
            events=lambda: state.events.counts,
            not_after=lambda: None if state.certificate is None else state.certificate.not_after,
            keys=state.keys_counted,
            sources=lambda: state.registry.sources,
            wishes=state.watch.wishes,
        )
        self._collectors = (BatonCollector(state.config, sources), process_collector())

    async def front(self, request: Request) -> Response:
        return self.web.page() if self.web.is_asked_for(request.scope) else await self.index()

    async def index(self) -> Response:
        return PlainTextResponse(INDEX)

    async def metrics(self) -> Response:
        return Response(await render(self._collectors), headers={"content-type": CONTENT_TYPE})

    async def discovery(self) -> Response:
        now = time.monotonic()
        sources = [source.described(now) for source in self._state.registry.sources]
        return Response(msgspec.json.encode(sources), media_type="application/json")

    async def scaling(self) -> Response:
        if self._state.config.scaling is None:
            raise NotFound("the config has no section `scaling`: nobody counts how many workers are wanted")
        return Response(msgspec.json.encode(self._state.watch.wishes()), media_type="application/json")

    async def processes(self) -> Response:
        return Response(msgspec.json.encode(self._state.processes()), media_type="application/json")
