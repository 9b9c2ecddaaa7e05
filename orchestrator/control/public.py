"""The public pages are health, readiness, version, models and docs.

FastAPI serves every path that the data plane does not. Endpoints return `Response` objects directly; errors
look like OpenAI's here too.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from orchestrator import __version__
from orchestrator.api.openapi import describe_data_plane
from orchestrator.config.options import ModelConfig
from orchestrator.control.docs_page import docs_page
from orchestrator.control.pages import add_page, as_json, authorization_of, build_info, guarded
from orchestrator.control.state import State
from orchestrator.errors import UnknownModel
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import IN_SERVICE

# Answered without a key: load balancers and supervisors have none.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/version"})
# A probe brings a worker back within seconds.
READY_RETRY_AFTER_S = 2
# Workers whose troubles are shown: a load balancer asks every second, and wants to know the status.
MAX_TROUBLED = 32


def control_app(state: State) -> FastAPI:
    """Return the app of health, readiness, version, models and docs."""
    app = _ControlPlane(
        title="Baton",
        version=__version__,
        docs_url=None,  # FastAPI's page loads its parts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    pages = _Pages(state)
    add_page(
        app,
        "/health",
        pages.health,
        "The process is up; `?verbose` adds figures, for a key if there are keys.",
        "health",
    )
    add_page(app, "/ping", pages.health, "The same, as SageMaker asks.", "health")
    app.add_api_route("/ping", pages.health, methods=["POST"], include_in_schema=False)
    add_page(app, "/load", pages.load, "How many requests are in progress in this process.", "health")
    add_page(
        app,
        "/ready",
        pages.ready,
        "200 if every model can be served, with `?any` if one can, else 503 with the reasons.",
        "health",
    )
    add_page(app, "/version", pages.version, "Baton's version.", "health")
    add_page(app, "/v1/models", pages.models, "The models that requests can name.", "models")
    add_page(app, "/v1/models/{name:rest}", pages.model, "One model.", "models")
    app.add_api_route("/docs", pages.docs_of(app), methods=["GET", "HEAD"], include_in_schema=False)
    return guarded(app, state, lambda scope: scope["path"] in OPEN_PATHS)


class _ControlPlane(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            describe_data_plane(super().openapi())
        return super().openapi()


class _Pages:
    def __init__(self, state: State) -> None:
        self._state = state

    async def health(self, request: Request) -> Response:
        is_verbose = "verbose" in request.query_params
        if is_verbose and self._state.keys is not None:  # what a process is and holds is not for everybody
            self._state.keys.check(authorization_of(request.scope))
        return as_json({"status": "ok"} | (_figures(self._state) if is_verbose else {}))

    def docs_of(self, app: FastAPI) -> Callable[[], Awaitable[Response]]:
        async def docs() -> Response:
            return docs_page(app.openapi())

        return docs

    async def load(self) -> Response:
        return as_json({"server_load": self._state.telemetry.in_flight})

    async def ready(self, request: Request) -> Response:
        problems = self._state.model_problems()
        is_draining = self._state.is_draining
        said = {"models": problems} | _troubled(self._state.workers())
        enough = any if "any" in request.query_params else all
        if not is_draining and enough(problem is None for problem in problems.values()):
            return as_json({"status": "ready"} | said)
        status = "draining" if is_draining else "not ready"
        answer = as_json({"status": status} | said, 503)
        answer.headers["retry-after"] = str(READY_RETRY_AFTER_S)
        return answer

    async def version(self) -> Response:
        return as_json({"version": __version__})

    async def models(self) -> Response:
        return as_json({"object": "list", "data": list(self._cards().values())})

    async def model(self, name: str) -> Response:
        cards = self._cards()
        if name not in cards:
            raise UnknownModel(f"no model {name[:200]!r}; there is {', '.join(cards)}", param="model")
        return as_json(cards[name])

    def _cards(self) -> dict[str, dict[str, object]]:
        """Describe by name all that requests can name: models, then adapters, then aliases."""
        config = self._state.config
        cards = {model.name: self._model(model) for model in config.models}
        for model in config.models:
            for name in self._adapters(model):
                adapter = {"root": name, "parent": model.name}
                cards.setdefault(name, cards[model.name] | self._named(name) | adapter)
        for alias, target in config.aliases.items():
            if target in cards:
                cards[alias] = cards[target] | self._named(alias)
        return cards

    def _named(self, name: str) -> dict[str, object]:
        return {"id": name, "permission": [_permission(name, int(self._state.started))]}

    def _adapters(self, model: ModelConfig) -> list[str]:
        """Return the adapters that the config lists, then those that workers list."""
        workers = [worker for worker in self._state.workers() if worker.address.model == model.name]
        listed = {name for worker in workers for name in worker.adapters}
        return [*model.adapters, *sorted(listed - {*model.adapters})]

    def _model(self, model: ModelConfig) -> dict[str, object]:
        """Describe a model with all fields that vLLM's list has: its own benchmark reads `root`, for one."""
        created = int(self._state.started)
        workers = [worker for worker in self._state.workers() if worker.address.model == model.name]
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "baton",
            "root": model.path or _served_model(workers, model.name),
            "parent": None,
            "max_model_len": _max_model_len(workers),
            "permission": [_permission(model.name, created)],
        }


def _served_model(workers: Iterable[WorkerStatus], model: str) -> str:
    """Return the workers' own name of a model whose path is not known: vLLM's default is its path."""
    return next((worker.address.served_model for worker in workers), model)


def _max_model_len(workers: Iterable[WorkerStatus]) -> int | None:
    """Return how many tokens every worker can take, as far as they told."""
    return min((w.max_model_len for w in workers if w.max_model_len is not None), default=None)


def _permission(model: str, created: int) -> dict[str, object]:
    """Return what vLLM says of every model; nobody here goes by it."""
    return {
        "id": f"modelperm-{sha256(model.encode()).hexdigest()[:32]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _troubled(statuses: Iterable[WorkerStatus]) -> dict[str, object]:
    """Return by name why workers cannot be used, in words that everybody may read; nothing if all can."""
    found = [status for status in statuses if status.reason is not None and status.state not in IN_SERVICE]
    if not found:
        return {}
    shown = {status.address.name: f"{status.state}: it {status.reason}" for status in found[:MAX_TROUBLED]}
    more = len(found) - len(shown)
    return {"workers": shown | ({"...": f"and {more} more"} if more else {})}


# --- figures ------------------------------------------------------------------------------------


def _figures(state: State) -> dict[str, object]:
    return {
        **build_info(state.transport),
        "process": state.index,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - state.started, 3),
        "rss_bytes": _rss_bytes(),
        "loop_lag_ms": {"last": round(state.lag.last_s * 1e3, 3), "max": round(state.lag.max_s * 1e3, 3)},
        "in_flight": state.telemetry.in_flight,
        "tasks": len(asyncio.all_tasks()),  # one that outlives its request shows here
    }


def _rss_bytes() -> int:
    """Return the resident memory now; where /proc is missing, its highest value so far."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
