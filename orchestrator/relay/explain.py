"""What would become of a request is told here. It goes the way of `relay/flow.py` up to its plan, dry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from orchestrator.control.state import RouteAnswer, RouteQuestion
from orchestrator.errors import BatonError, ClientError
from orchestrator.http.exchange import BodySource, Exchange, Headers
from orchestrator.relay.admission import Gate
from orchestrator.relay.flow import Asked, Flow
from orchestrator.relay.scope import DataPlane, RequestScope
from orchestrator.routing.dry_run import explain

_log: Final = logging.getLogger("baton.explain")
_NOBODY: Final = "nobody is answered"


class DryExchange(Exchange):
    """This is a request that came in another way. Nobody waits for an answer."""

    def __init__(self, question: RouteQuestion, method: str) -> None:
        path, _, query = question.path.partition("?")
        self.method = method
        self.headers = question.headers
        self.content_length = len(question.body)
        self.body_size = len(question.body)
        self.is_counted = True
        self.is_gone = self.is_started = self.is_complete = False
        self._path = path
        self._query = query.encode()

    @property
    def path(self) -> str:
        return self._path

    @property
    def query(self) -> bytes:
        return self._query

    @property
    def client(self) -> tuple[str, int] | None:
        return None

    @property
    def request_id(self) -> str:
        return ""

    def header(self, name: bytes) -> bytes | None:
        return next((value for field, value in reversed(self.headers) if field == name), None)

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        raise RuntimeError(_NOBODY)

    async def read_body(self) -> bytes:
        raise RuntimeError(_NOBODY)

    @property
    def source(self) -> BodySource:
        raise RuntimeError(_NOBODY)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        raise RuntimeError(_NOBODY)

    def start(self, status: int, headers: Headers) -> None:
        raise RuntimeError(_NOBODY)

    def feed(self, chunk: bytes) -> bool:
        raise RuntimeError(_NOBODY)

    async def drain(self) -> None:
        raise RuntimeError(_NOBODY)

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        raise RuntimeError(_NOBODY)

    def finish(self, chunk: bytes = b"") -> None:
        raise RuntimeError(_NOBODY)

    def abort(self) -> None:
        raise RuntimeError(_NOBODY)


def explained(
    flow: Flow, plane: DataPlane, question: RouteQuestion, process: Mapping[str, int]
) -> RouteAnswer:
    """Tell what would become of a request; if it would be refused, with the error that its client would get.

    `process` says who tells.
    """
    try:
        scope = _scope(plane, question)
        document = _document(flow.dry_run(scope, question.body, question.avoid))
    except BatonError as error:
        return RouteAnswer(error.status, error.body())
    except Exception:  # a bug of ours, or of a policy: requests go on
        _log.exception("what would become of a request cannot be told")
        return RouteAnswer(500, BatonError("internal error").body())
    made = {"process": process, "path": scope.record.endpoint, **document}
    return RouteAnswer(200, msgspec.json.encode(made))


def _scope(plane: DataPlane, question: RouteQuestion) -> RequestScope:
    path = question.path.partition("?")[0]
    entry = plane.entry_of(path)
    if entry is None:
        known = ", ".join(plane.endpoints)
        raise ClientError(f"no requests are served at {path[:200]!r}; there is: {known}", param="path")
    return RequestScope(plane, DryExchange(question, plane.endpoints[entry].method))


def _document(asked: Asked) -> dict[str, Any]:
    route, view, holder = asked.route, asked.view, asked.holder
    made: dict[str, Any] = {"model": route.pools.model, "admission": _admission(route.gate)}
    if holder is not None:
        plan = {"path": "aggregated", "prefill": None, "decode": holder.name}
        return made | {"plan": {**plan, "whole_reason": "what the request names is there"}}
    tokens = view.prompt_tokens()
    told = explain(route.planner, view, route.pools, asked.whole_reason, asked.avoid)
    return made | {"prompt_tokens": tokens, **told}


def _admission(gate: Gate) -> dict[str, Any]:
    """Tell whether the request would have to wait before it is planned."""
    waits = gate.free <= 0 and gate.seats > 0
    why = f"no seat is free, and {gate.waiting} wait" if waits else "a seat is free"
    if not gate.seats:
        why = "no worker gives seats: the plan says what is missing"
    return {"seats": gate.seats, "free": gate.free, "waiting": gate.waiting, "waits": waits, "why": why}
