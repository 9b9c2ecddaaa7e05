"""/admin/explain tells who would serve a request, and why: nothing is sent, and nothing is learned of it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.control.queries import Query
from orchestrator.control.state import AdminState, RouteQuestion
from orchestrator.errors import BodyTooLarge

CHATS = "/v1/chat/completions"
MOST_PROCESS = 10**9  # the highest index of a process that is looked for
# These are of the connection to this listener, or no client's.
_NOT_THE_CLIENTS = frozenset({b"authorization", b"host", b"connection", b"content-length"})


class ExplainPage:
    def __init__(self, state: AdminState) -> None:
        self._state = state

    async def explain(self, request: Request) -> Response:
        """Answer with the plan of a request with this body, and these headers.

        `?path=` is its path, by default that of chats. `?avoid=`, which may be repeated, names a worker that
        has failed it. `?process=` is the index of the process that is to tell.
        """
        query = Query(request.query_params, ("path", "process"), ("avoid",))
        path = query.text("path")
        question = RouteQuestion(
            path=CHATS if path is None else path,
            headers=[field for field in request.headers.raw if field[0] not in _NOT_THE_CLIENTS],
            body=await self._body(request),
            avoid=tuple(query.texts("avoid")),
            process=None if query.text("process") is None else query.number("process", 0, MOST_PROCESS),
        )
        answer = await self._state.explain(question)
        return Response(answer.content, answer.status, media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        most = self._state.config.orchestrator.limits.max_body_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise BodyTooLarge(f"the body has more than {most} bytes")
        return bytes(body)
