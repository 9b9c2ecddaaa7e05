"""Errors form a tree, by whose fault it was.

Each error knows its HTTP status, the OpenAI `type` and `code` that clients map to their exception
classes, and whether trying elsewhere may help. Errors become answers in one place, `relay/scope.py`;
foreign exceptions become these once, at the edge where they enter. `StartError` is no answer: it ends the
process before there are clients.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

# What OpenAI's SDKs ask before they decide by the status.
_NO_RETRY = (b"x-should-retry", b"false")


class StartError(Exception):
    """The orchestrator cannot start; the message says what to change."""


class SettingError(StartError):
    """A variable of the environment has a value that cannot be right."""


class BatonError(Exception):
    """All that ends a request early extends this. `message` is safe to show to a client."""

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry_after_s: int | None = None
    should_retry = True  # False: it was retried here as often as is good; SDKs obey the header

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the head of an answer that tells of this error."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if not self.should_retry:
            headers.append(_NO_RETRY)
        return headers

    def body(self) -> bytes:
        """Return the OpenAI error object, as JSON."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


# --- the client's fault -------------------------------------------------------------------------


class ClientError(BatonError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnsupportedMediaType(ClientError):
    """The body is of another media type than the endpoint takes; the status is vLLM's."""

    code = "unsupported_media_type"


class Unauthorized(ClientError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class Forbidden(ClientError):
    status = 403
    code = "forbidden"


class MissingScope(Forbidden):
    """The API key is right, but not for this; to ask again with it does not help."""

    code = "missing_scope"
    should_retry = False


class NotFound(ClientError):
    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class UnknownResponse(NotFound):
    """No worker has this response: it was not stored, or the worker that stored it has ended."""

    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id[:100]}' not found.", param="response_id")


class MethodNotAllowed(ClientError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str = "GET, POST") -> None:
        """`allow` names the methods that the path does have."""
        super().__init__(message)
        self.allow = allow

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"allow", self.allow.encode())]


class RequestTimeout(ClientError):
    """The client sent its request too slowly."""

    status = 408
    code = "request_timeout"


class Conflict(ClientError):
    """What is asked for does not fit what is there."""

    status = 409
    code = "conflict"


class BodyTooLarge(ClientError):
    status = 413
    code = "request_too_large"


class UriTooLong(ClientError):
    status = 414
    code = "uri_too_long"


class UnsupportedEncoding(ClientError):
    status = 415
    code = "unsupported_content_encoding"


class Misdirected(ClientError):
    """The client asked for a host that this server is not."""

    status = 421
    code = "misdirected_request"


class RateLimited(ClientError):
    """The API key is over one of its limits; code and types are OpenAI's."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = max(1, retry_after_s)


class RequestsLimited(RateLimited):
    """It has sent too many requests, or has too many open."""

    type = "requests"


class TokensLimited(RateLimited):
    """It has used too many tokens."""

    type = "tokens"


class HeadersTooLarge(ClientError):
    status = 431
    code = "headers_too_large"


class ClientGone(BatonError):
    """The client closed its connection. Nobody reads an answer; 499 is for logs and metrics only."""

    status = 499
    code = "client_closed_request"


# --- nobody can take it now ---------------------------------------------------------------------


class Unavailable(BatonError):
    status = 503
    type = "service_unavailable"
    code = "no_worker"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    code = "overloaded"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class TooManyConnections(Overloaded):
    """All connections that clients may have are open, and all are in use."""

    code = "too_many_connections"


class OutOfResources(Unavailable):
    """This machine lacks what a connection to a worker takes: a descriptor, a port, a buffer, a resolver.

    It says nothing about the worker.
    """

    code = "out_of_resources"


class TooBusy(Overloaded):
    """There is neither a seat nor a place in the queue for it, now."""

    status = 429
    type = "rate_limit_error"
    code = "too_busy"


class DeadlineExceeded(BatonError):
    """It took too long, in the queue or at the workers. A retry would cost as much again."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    should_retry = False


# --- a worker's fault ---------------------------------------------------------------------------


class WorkerError(BatonError):
    """A worker failed while serving a leg."""

    status = 502
    type = "upstream_error"
    code = "worker_error"


class WorkerUnreachable(WorkerError):
    """No connection was made: not one byte of the leg was written, so the worker never saw it."""

    code = "worker_unreachable"


class WorkerOut(WorkerUnreachable):
    """The leg was not sent: its worker had fallen out of service since it was chosen."""


class WorkerCutShort(WorkerError):
    """The connection broke after bytes of the leg were written, before the answer was complete."""

    code = "worker_cut_short"


class UploadLost(WorkerCutShort):
    """A worker was lost in the middle of an upload, whose beginning was not kept: only its client can send it
    again.
    """

    code = "upload_lost"


class WorkerGarbage(WorkerError):
    """The answer was not HTTP, or not what this leg must answer with. A retry would repeat the work."""

    code = "worker_garbage"
    should_retry = False


class WorkerUnfit(WorkerError):
    """The worker answered as none of ours does: it refuses the orchestrator's key, sends elsewhere, or is no
    model server. What the client asked for has no part in it.
    """

    code = "worker_unfit"

    def __init__(self, answered: int) -> None:
        """`answered` is the status with which it did."""
        super().__init__(f"the worker does not serve the orchestrator: it answered {answered}")
        self.answered = answered


class PathMissing(WorkerUnfit):
    """The worker's server does not have the path: the model is not made for it, for all that is known."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"

    def __init__(self, answered: int, path: str) -> None:
        super().__init__(answered)
        self.message = f"the workers of this model do not serve {path}"


class HandoffLate(WorkerError):
    """The decode worker had not begun its answer when the lease of the KV blocks ended: what it pulls then
    may be of another prompt.
    """

    code = "handoff_late"


class HandoffStalled(WorkerError):
    """The decode worker did not get on with the hand-off, and another one may."""

    code = "handoff_stalled"


class KvMissing(BatonError):
    """The KV cache did not get from the prefill to the decode worker, and `kv_missing: fail` minds."""

    status = 502
    type = "upstream_error"
    code = "kv_missing"


class Poison(BatonError):
    """Workers were lost with the request, so many that it may be what ends them: no other one gets it."""

    status = 502
    type = "upstream_error"
    code = "poison"
    should_retry = False


BUSY = frozenset({429, 503})  # statuses of a worker that has too much to do
BUSY_S = 1  # it is avoided for so long, if it does not say: it answers fast, so it would be the least loaded


class WorkerAnswered(BatonError):
    """The worker answered with an error of its own, and the client gets its status and its body."""

    type = "upstream_error"
    code = "worker_answered"

    def __init__(
        self,
        status: int,
        content: bytes,
        *,
        content_type: bytes = b"application/json",
        retry_after: bytes | None = None,
        shown: bytes | None = None,
    ) -> None:
        """`content` is the worker's; the client gets `shown` in its place, as JSON, if that is given."""
        super().__init__(f"the worker answered {status}")
        self.status = status
        self.content = content
        self.content_type = content_type
        self.shown = shown
        self.retry_after = retry_after  # as the worker wrote it
        if retry_after is not None and retry_after.isdigit():
            self.retry_after_s = int(retry_after[:9])
        elif status in BUSY:
            self.retry_after_s = BUSY_S

    def headers(self) -> list[tuple[bytes, bytes]]:
        content_type = self.content_type if self.shown is None else b"application/json"
        headers = [(b"content-type", content_type)]
        if self.retry_after is not None:
            headers.append((b"retry-after", self.retry_after))
        if not self.should_retry:
            headers.append(_NO_RETRY)
        return headers

    def body(self) -> bytes:
        return self.content if self.shown is None else self.shown
