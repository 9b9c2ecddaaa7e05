"""/admin/requests shows requests of late: those that match, or all that became of one."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.control.queries import MOST_TEXT, Query
from orchestrator.control.state import AdminState
from orchestrator.errors import NotFound, Unavailable
from orchestrator.telemetry.history import KEPT, KEPT_LONG
from orchestrator.telemetry.query import RequestQuery

MOST: Final = 1000  # in a list
USUAL: Final = 50
SAME: Final = 20  # requests with one id that are counted


class RequestPages:
    def __init__(self, state: AdminState) -> None:
        self._state = state

    async def all(self, request: Request) -> Response:
        """Answer with the newest requests that match the query; with `?slowest=1` with the slowest."""
        known = ("key", "model", "worker", "failed", "slowest", "slower_than", "limit")
        query = Query(request.query_params, known)
        found = await self._state.requests(
            RequestQuery(
                key=query.text("key"),
                model=query.text("model"),
                worker=query.text("worker"),
                failed=query.switch("failed"),
                slowest=query.switch("slowest"),
                slower_s=query.seconds("slower_than"),
                limit=query.number("limit", USUAL, MOST),
            )
        )
        return _answer({"requests": found.requests, "unanswered": found.unanswered})

    async def one(self, request: Request, name: str) -> Response:
        """Answer with what became of a request that a client knows by this name: of several, of the newest,
        and with how many others there are.
        """
        Query(request.query_params, ())
        if len(name) > MOST_TEXT:
            raise NotFound(f"no request has an id of {len(name)} characters")
        found = await self._state.requests(RequestQuery(name=name, limit=SAME))
        if found.requests:
            first, *others = found.requests
            return _answer({**first, "others_with_this_id": len(others)})
        if found.unanswered:
            silent = ", ".join(map(str, found.unanswered))
            raise Unavailable(f"process {silent} does not answer, and no other one knows request {name!r}")
        raise NotFound(
            f"no request {name[:200]!r} is known: the last {KEPT} of each process are kept, and of "
            f"earlier ones the {KEPT_LONG} slowest and the {KEPT_LONG} that failed last"
        )


def _answer(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
