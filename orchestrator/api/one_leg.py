"""These paths are served by one worker, whose answer the client gets as it is: pooling, scores, renderings,
and what else vLLM has that makes no KV cache worth handing over.

A worker has those that its model and its options are for; the others it answers with 404.
"""

from __future__ import annotations

from typing import Final

from orchestrator.api.base import Endpoint
from orchestrator.api.view import InvalidRequest, RequestView
from orchestrator.http.exchange import Exchange
from orchestrator.wire.judge import check_answer
from orchestrator.wire.sse import Events, EventStream
from orchestrator.wire.usage import Kv, Usage

_FORM: Final = "encoding_format"
_NO_JSON: Final = frozenset({b'"bytes"', b'"bytes_only"'})
_UNKNOWN: Final = Kv.UNKNOWN

# vLLM 0.32 names them so; some have two or three names.
WHOLE: Final = (
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v2/embed",
    "/generative_scoring",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions/render",
)

# Their answers may be streams. SageMaker's path takes the requests of all others.
STREAMED: Final = ("/inference/v1/generate", "/invocations")


class OneLegEndpoint(Endpoint):
    """One worker does everything; of its answers nothing is expected but that they are JSON."""

    def __init__(self, *, streams: bool = False) -> None:
        super().__init__(needs_one_worker=True, streams=streams, can_continue=False)

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        view = super().read(body, exchange)
        if bytes(view.own.get("encoding_format", b"")) in _NO_JSON:
            raise InvalidRequest("answers that are no JSON are relayed by /v1/embeddings alone", _FORM)
        return view

    def events(
        self, view: RequestView, *, hides_usage: bool, cached_tokens: int | None, created_tokens: int | None
    ) -> Events:
        """Return a reader to which it does not matter how many choices there are: each path says that in its
        own way.
        """
        return EventStream(hides_usage=False, cached_tokens=None, created_tokens=None, choices=0)

    def whole(
        self, view: RequestView, content: bytes, *, cached_tokens: int | None, created_tokens: int | None
    ) -> tuple[Kv, bytes, Usage | None]:
        return _UNKNOWN, check_answer(content), None
