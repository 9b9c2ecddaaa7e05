"""An endpoint says how one path of the data plane is served.

A new endpoint is one file beside this one and one entry in `ENDPOINTS`. An endpoint is made once per
process and keeps nothing of a request.

What an answer must look like is the endpoint's alone; relay and failover ask it, and look into nothing:

| question | asked of | in OpenAI's forms |
|---|---|---|
| Has the stream begun? | `Events.has_begun` | an event says more than a role |
| Is it whole but for its end? | `Events.is_done` | `[DONE]`, and a `finish_reason` for each choice |
| Does it tell of an error? | `Events.feed` raises `WorkerFailed` | `{"error": ...}`, and other spellings |
| Did it end early? | `feed` or `finish` raises `InvalidStream` | `[DONE]` or a `finish_reason` is missing |
| What became of the hand-off? | `Events.kv` | the usage counts all of the prompt as cached |
| The same of a whole answer? | `Endpoint.whole` | the same, of one document |
| How is an error told to the client? | `Endpoint.error`, `error_event` | an object; an event and `[DONE]` |

Whoever writes `Events` for another API also mends its usage there (`cached_tokens`, `created_tokens`), and
leaves out what is for engines alone (`kv_transfer_params`). A stream whose client did not ask for its usage
has it asked for by us: `hides_usage` then. An API whose streams always tell it has `read` return a view with
`wants_usage`, so that nothing is asked for and nothing withheld.

How a request becomes legs, its `form` says (`api/leg_form.py`), and `holder` which worker alone can serve
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from orchestrator.api.leg_form import OPENAI, LegForm
from orchestrator.api.view import RequestView, view_request
from orchestrator.compiled import mypyc_attr
from orchestrator.config.keys import BEARER
from orchestrator.errors import BatonError, UnsupportedMediaType
from orchestrator.http.exchange import Exchange
from orchestrator.wire.judge import check_answer, judged
from orchestrator.wire.sse import Events, EventStream, error_event
from orchestrator.wire.usage import Kv, Usage

_UNKNOWN: Final = Kv.UNKNOWN
JSON: Final = b"application/json"
Content = tuple[bytes, bytes]  # a header block, with the content type in it, and the body


@mypyc_attr(allow_interpreted_subclasses=True)
class Conversion(ABC):
    """A conversion makes another form of a worker's whole answer to one request, if the client wants one."""

    @abstractmethod
    async def convert(self, content: bytes) -> Content:
        """Return what the client gets for the body of a 200. Raises `WorkerGarbage` if it is not as asked
        for.
        """
        ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Endpoint:
    """An endpoint is one path, with the forms of OpenAI; a subclass changes what differs."""

    def __init__(
        self,
        *,
        needs_one_worker: bool = False,
        streams: bool = True,
        can_continue: bool = True,
        media_type: bytes = JSON,
    ) -> None:
        """With `needs_one_worker` nothing is handed over, one leg does everything; with `streams` answers can
        be streams of events, and whole ones have choices that have ended, as a stream has. With
        `can_continue` those are OpenAI's chats or completions, so that another worker can go on with one
        whose worker was lost. Bodies are of `media_type`, in lower case.
        """
        self.needs_one_worker = needs_one_worker
        self.streams = streams
        self.can_continue = can_continue
        self.media_type = media_type
        self.method = "POST"
        self.wanted_key = BEARER  # how a client is told to send its key
        self.form: LegForm = OPENAI  # how requests become legs
        self.has_holders = False  # a request may have to go to the worker that holds something
        self.asks_holder = False  # every request does, as it is: it is about what that worker holds

    def credential(self, exchange: Exchange) -> bytes | None:
        """Return the client's key as an `Authorization` value; None if it gives none."""
        return exchange.header(b"authorization")

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        """Return what is routed on. Raises `InvalidRequest`."""
        return view_request(body, exchange)

    def holder(self, view: RequestView, exchange: Exchange) -> str | None:
        """Return the mark (`api/holders.py`) of the only worker that can serve the request; None if any can.
        Raises `UnknownResponse`. It is asked if `has_holders` or `asks_holder`.
        """
        return None

    def target(self, exchange: Exchange) -> str:
        """Return the path, and the query, at which the worker is asked; for one that `asks_holder`."""
        return exchange.path

    def check_content_type(self, content_type: bytes | None) -> None:
        """Raise `UnsupportedMediaType` if a body of this content type is none of this endpoint's.

        This asks what vLLM asks: parameters are ignored, a suffix (`application/x+json`) is another type, and
        so is none. A page of another site can send text and forms without asking, but not JSON.
        """
        given = b"" if content_type is None else content_type.strip().lower()
        if given.partition(b";")[0] != self.media_type:
            allowed = self.media_type.decode()
            raise UnsupportedMediaType(f"Unsupported Media Type: Only '{allowed}' is allowed")

    def adapt(self, view: RequestView, exchange: Exchange) -> tuple[RequestView, Conversion | None]:
        """Return the request as its workers get it, and what is made of their answer; None if the client gets
        that.
        """
        return view, None

    def events(
        self, view: RequestView, *, hides_usage: bool, cached_tokens: int | None, created_tokens: int | None
    ) -> Events:
        """Return the reader of one worker's stream, which answers the client's request `view`.

        With `hides_usage` the client did not ask for the usage that the worker tells. `cached_tokens` and
        `created_tokens` are what it must say of the prefix cache, which only the prefill worker knows; None
        if that is not known, or the worker that answers has prefilled: then it is left as it is.
        """
        return EventStream(
            hides_usage=hides_usage,
            cached_tokens=cached_tokens,
            created_tokens=created_tokens,
            choices=view.choices(),
        )

    def whole(
        self, view: RequestView, content: bytes, *, cached_tokens: int | None, created_tokens: int | None
    ) -> tuple[Kv, bytes, Usage | None]:
        """Judge the body of a worker's 200 that is no stream: return what became of the hand-off, if there
        was one, what the client gets, and the usage, if tokens are counted. The numbers are those of
        `events`.

        Raises `WorkerFailed` if it tells of an error, `InvalidStream` if it ended early, `InvalidAnswer` if
        it is something else. It is not asked where `adapt` has returned a `Conversion`.
        """
        if self.streams:
            return judged(content, cached_tokens, created_tokens)
        return _UNKNOWN, check_answer(content), None

    def error(self, error: BatonError) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return headers and body of an answer that tells of `error`, whose status is the error's own."""
        return error.headers(), error.body()

    def error_event(self, error: BatonError) -> bytes:
        """Return the last events of a stream that fails after its first byte."""
        return error_event(error.body())
