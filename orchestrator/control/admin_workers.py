"""/admin/workers shows who serves, and lets the operator change that while requests go on.

Changes hold until the orchestrator ends; those that are to outlast it belong into the config
(`control/reload.py`).
"""

from __future__ import annotations

import msgspec
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.config.addresses import unmanaged
from orchestrator.config.base import Model
from orchestrator.config.options import Url
from orchestrator.errors import ClientError, NotFound, UnknownModel
from orchestrator.wire.info import Role
from orchestrator.workers.registry import Registry
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

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def all(self) -> Response:
        return _answer(self._registry.statuses())

    async def add(self, request: Request) -> Response:
        """Add a worker and answer 201; it serves once a probe has found it well."""
        new = _new_worker(await request.body())
        if new.model not in self._registry.pools:
            known = ", ".join(self._registry.pools)
            raise UnknownModel(f"no model {new.model[:MAX_NAME]!r}; there is {known}", param="model")
        index = self._registry.next_index(new.model, new.role)
        address = unmanaged(new.model, new.role, index, new.url, new.served_model, new.zone)
        return _answer(self._registry.add(address).status(), 201)

    async def drain(self, name: str) -> Response:
        """Drain a worker: legs under way go on, none begins; `in_flight` says when the worker is free."""
        worker = self._find(name)
        self._registry.drain(worker)
        return _answer(worker.status())

    async def undrain(self, name: str) -> Response:
        worker = self._find(name)
        self._registry.undrain(worker)
        return _answer(worker.status())

    async def remove(self, name: str) -> Response:
        """Remove a worker and answer 202: it drains, and stays in the list until its last leg has ended."""
        worker = self._find(name)
        self._registry.remove(worker)
        return _answer(worker.status(), 202)

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
        raise ClientError("; ".join(_mistakes(error))) from error


def _mistakes(error: ValidationError) -> list[str]:
    return [
        ": ".join((*map(str, mistake["loc"]), mistake["msg"].removeprefix("Value error, ")))
        for mistake in error.errors(include_url=False)
    ]
