"""/admin/workers shows who serves, and lets the operator change that while requests go on.

Changes hold until the orchestrator ends; those that are to outlast it belong into the config
(`control/reload.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.config.addresses import is_allowed_worker, unmanaged
from orchestrator.config.base import Model
from orchestrator.config.options import Url
from orchestrator.control.changes import Changes
from orchestrator.control.pages import OF_RUN, mistaken
from orchestrator.control.state import AdminState
from orchestrator.errors import NotFound, UnknownModel
from orchestrator.wire.info import Role, Streams
from orchestrator.workers.worker import Worker

MAX_NAME = 200  # characters of what a client sent, in an error


class NewWorker(Model):
    """This describes a worker that is to be added; Baton does not start it."""

    model: str
    role: Role
    url: Url
    served_model: str | None = None
    zone: str | None = None


class WorkerPages:
    """These endpoints change the registry that decides: the only process's, or the supervisor's."""

    def __init__(self, state: AdminState, changes: Changes) -> None:
        self._state = state
        self._registry = state.registry
        self._changes = changes

    async def all(self) -> Response:
        """Show all workers with their figures."""
        return _answer([self._described(worker) for worker in self._registry.workers])

    def _described(self, worker: Worker) -> dict[str, Any]:
        figures: dict[str, Any] = msgspec.to_builtins(self._state.watch.figures(worker))
        del figures["cells"]
        described: dict[str, Any] = msgspec.to_builtins(worker.status())
        return {**described, "streams": self._streams(worker), **figures}

    def _streams(self, worker: Worker) -> Streams:
        """Return how legs go to a worker: each on a connection of its own, or many on one."""
        return "mux" if self._state.streams == "mux" and worker.takes_streams else "http"

    async def add(self, request: Request) -> Response:
        """Add a worker and answer 201; it serves once a probe has found it well.

        It gets the workers' credential only if the config allows its address, or `baton up` has started it.
        """
        new = _new_worker(await request.body())
        if new.model not in self._registry.pools:
            known = ", ".join(self._registry.pools)
            raise UnknownModel(f"no model {new.model[:MAX_NAME]!r}; there is {known}", param="model")
        index = self._registry.next_index(new.model, new.role)
        address = unmanaged(new.model, new.role, index, new.url, new.served_model, new.zone)
        is_ours = OF_RUN in request.scope
        is_allowed = is_ours or is_allowed_worker(address.host, self._state.config.orchestrator.allow_workers)
        worker = self._registry.add(replace(address, gets_credential=is_allowed, is_managed=is_ours))
        how = "" if is_allowed else ", without the credential of workers, as allow_workers does not name it"
        self._note(request, "add", f"{worker.name} at {worker.address.url} was added{how}", worker)
        return _answer(worker.status(), 201)

    async def drain(self, request: Request, name: str) -> Response:
        """Drain a worker: legs under way go on, none begins; `in_flight` says when the worker is free."""
        worker = self._find(name)
        self._registry.drain(worker)
        self._note(request, "drain", f"{worker.name} was drained", worker)
        return _answer(worker.status())

    async def undrain(self, request: Request, name: str) -> Response:
        worker = self._find(name)
        self._registry.undrain(worker)
        self._note(request, "undrain", f"{worker.name} was undrained", worker)
        return _answer(worker.status())

    async def remove(self, request: Request, name: str) -> Response:
        """Remove a worker and answer 202: it drains, and stays in the list until its last leg has ended."""
        worker = self._find(name)
        self._registry.remove(worker)
        self._note(request, "remove", f"{worker.name} was removed", worker)
        return _answer(worker.status(), 202)

    def _note(self, request: Request, kind: str, what: str, worker: Worker) -> None:
        self._changes.note(request, f"admin.{kind}", what, subject=worker.name)

    def _find(self, name: str) -> Worker:
        worker = self._registry.find(name)
        if worker is None:
            known = ", ".join(worker.name for worker in self._registry.workers)
            raise NotFound(f"no worker {name[:MAX_NAME]!r}; there is {known}")
        return worker


def _answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _new_worker(body: bytes) -> NewWorker:
    try:
        return NewWorker.model_validate_json(body)
    except ValidationError as error:
        raise mistaken(error) from error
