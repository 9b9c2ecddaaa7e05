"""A record holds one request as numbers: `telemetry/counters.py` counts it, the access log writes it down."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

from orchestrator.routing.policies.base import Reasons, Request
from orchestrator.wire.trace import TraceContext
from orchestrator.wire.usage import Kv, Usage


class Path(IntEnum):
    """A request was served on this path; it is NONE until that is decided."""

    NONE = 0
    DISAGGREGATED = 1
    AGGREGATED = 2


# Looking up a member of an enumeration costs as much as a call.
_NO_PATH: Final = Path.NONE
_NO_KV: Final = Kv.NONE


class LoggedRequest:
    """The log of decisions wants to know this beside what is in the record."""

    __slots__ = ("cached_tokens", "output_tokens", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.output_tokens: int | None = None  # as the usage told
        self.cached_tokens: int | None = None  # of the prompt, as the first prefill worker found them


class FailedAttempt:
    """A worker has failed a request, which may have been served elsewhere then."""

    __slots__ = (
        "answer_id",
        "began",
        "decode_sent",
        "had_begun",
        "outcome",
        "prefill_done",
        "prefill_sent",
        "prefill_worker",
        "seconds",
        "worker",
    )

    def __init__(self, worker: str, outcome: str, seconds: float, began: float = 0.0) -> None:
        """`outcome` says in a word how it has failed (`legs/retry.py`); it had the request for `seconds`,
        since `began`.
        """
        self.worker = worker
        self.outcome = outcome
        self.seconds = seconds
        self.began = began
        self.had_begun = False  # the client had some of the answer already
        self.answer_id = ""  # as in its Trail, if the leg that was to answer was sent; so are the moments
        self.prefill_worker: str | None = None  # None if one worker was to do all of it
        self.prefill_sent = 0.0
        self.prefill_done = 0.0  # that of an earlier attempt if this one built on the same hand-off
        self.decode_sent = 0.0

    def __str__(self) -> str:
        return f"{self.worker}:{self.outcome}:{self.seconds:.1f}s"


class Trail:
    """An admitted request leaves this behind for whoever asks about it later (`telemetry/timeline.py`).

    It holds no text of the request, and nothing that does: requests that have ended are kept for a while.
    """

    __slots__ = (
        "answer_id",
        "cached_tokens",
        "client_id",
        "decode_sent",
        "explained",
        "lease",
        "legs_id",
        "output_tokens",
        "prefill_sent",
        "prompt_tokens",
        "told_ms",
    )

    def __init__(self) -> None:
        # Milliseconds of queue, prefill and decode to first byte as the client was told them, which the
        # access line repeats; "" for a prefill that there was not.
        self.told_ms: tuple[str, str, str] | None = None
        self.explained = b""  # the last plan with the numbers of all workers, as JSON; of some requests
        self.legs_id = ""  # what its legs' names begin with
        self.answer_id = ""  # the name of the leg that was to answer last: workers make their ids of it
        self.client_id: bytes | None = None  # what the client calls it, if not by a request id that we repeat
        self.prefill_sent = 0.0  # moments; of the last attempt, those before it have their own
        self.decode_sent = 0.0
        self.prompt_tokens: int | None = None  # as the answer told; noted when the request has ended
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None  # of the prompt, as the first prefill worker found them
        self.lease = -1  # the LeaseState of the last prefill that no leg has failed, when its request ended


class Attempts:
    """These attempts were made to serve a request that did not succeed at once."""

    __slots__ = ("count", "failed", "handoff_given_up", "prefill_done")

    def __init__(self, failed: list[FailedAttempt] | None = None, count: int = 1) -> None:
        self.failed = [] if failed is None else failed  # what came to nothing, in its order
        self.count = count  # so often workers were chosen for it, once it was admitted
        # "late" or "stalled", for the last decode worker that had a hand-off so.
        self.handoff_given_up: str | None = None
        self.prefill_done = 0.0  # of the last attempt, if it goes on with a stream


ONE_ATTEMPT: Final = Attempts()  # that of a request that has none in its record; nobody changes it


class RequestRecord:
    """A record is filled in by `relay/scope.py` as its request goes.

    Moments are `loop.time()`, 0.0 for never.

    It holds no text of a prompt or an answer, and nothing that a client chose except a valid request id; but
    where decisions are logged it has the request until its line is written.
    """

    request_id: str
    endpoint: str  # one of the endpoints that Telemetry was made with; others are counted together
    path: Path
    kv: Kv
    received: float
    admitted = 0.0
    prefill_done = 0.0  # stays 0.0 when one worker serves the request as a whole
    first_byte = 0.0
    finished = 0.0
    model_index = -1  # in the config's list of models; -1: the request names none that we know
    is_stream = False
    status = 0  # as sent, or 499 if the client was gone before a head could be sent
    error_code: str | None  # BatonError.code; set also when a stream failed after its 200
    prefill_worker: str | None = None
    decode_worker: str | None = None
    attempts: Attempts | None  # None: the first one was the last
    reasons: Reasons[Any] | None = None  # of the last plan; None if there was none
    # As the answer told it; without one, the number of pieces in which the last worker's stream came.
    usage: Usage | int
    bytes_in = 0
    bytes_out = 0
    client: str | None  # name of the client's API key
    trail: Trail | None  # once it was admitted
    logged: LoggedRequest | None  # if it has a line in the log of decisions, until that is written
    trace: TraceContext | None = None  # where requests are traced
    in_flight_cell = -1  # belongs to Telemetry

    def __init__(self, request_id: str, endpoint: str, received: float) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.received = received
        self.path = _NO_PATH
        self.kv = _NO_KV
        self.usage = 0
        # To find the default of a class costs as much as to set three of these.
        self.error_code = self.client = self.logged = self.attempts = self.trail = None

    def stages(self) -> tuple[float, float, float, float]:
        """Return the seconds of each stage in the order of STAGES; -1.0 for a stage that was not completed.

        `decode_first_byte` starts where the leg that answers could start; an error is not such an answer.
        """
        admitted, prefill_done, first_byte = self.admitted, self.prefill_done, self.first_byte
        total = self.finished - self.received
        if not admitted:
            return -1.0, -1.0, -1.0, total
        queue = admitted - self.received
        prefill = prefill_done - admitted if prefill_done else -1.0
        decode = first_byte - (prefill_done or admitted) if first_byte and self.status < 400 else -1.0
        return queue, prefill, decode, total
