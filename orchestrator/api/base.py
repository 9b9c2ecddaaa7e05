"""An endpoint says how one path of the data plane is served.

A new endpoint is one file beside this one and one entry in `ENDPOINTS`. An endpoint is made once per
process and keeps nothing of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from orchestrator.api.view import RequestView
from orchestrator.compiled import mypyc_attr
from orchestrator.errors import BatonError, UnsupportedMediaType
from orchestrator.http.exchange import Exchange
from orchestrator.wire.sse import Events, EventStream, error_event

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
        be streams of events. With `can_continue` those are OpenAI's chats or completions, so that another
        worker can go on with one whose worker was lost. Bodies are of `media_type`, in lower case.
        """
        self.needs_one_worker = needs_one_worker
        self.streams = streams
        self.can_continue = can_continue
        self.media_type = media_type

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

    def events(self, *, hides_usage: bool, cached_tokens: int | None) -> Events:
        """Return the reader of one worker's stream; see `EventStream`."""
        return EventStream(hides_usage=hides_usage, cached_tokens=cached_tokens)

    def error(self, error: BatonError) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return headers and body of an answer that tells of `error`, whose status is the error's own."""
        return error.headers(), error.body()

    def error_event(self, error: BatonError) -> bytes:
        """Return the last events of a stream that fails after its first byte."""
        return error_event(error.body())
