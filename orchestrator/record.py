"""One request, as numbers: what `telemetry.py` counts and `logs.py` writes down."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from orchestrator.wire.usage import Kv


class Path(IntEnum):
    """How a request was served; NONE until that is decided."""

    NONE = 0
    DISAGGREGATED = 1
    AGGREGATED = 2


class RequestRecord(msgspec.Struct, kw_only=True, gc=False):
    """One request, filled in by `relay.py` as it goes. Moments are `loop.time()`, 0.0 for never.

    Holds no text of a prompt or an answer, and nothing that a client chose except a valid request id.
    """

    request_id: str
    endpoint: str  # one of the endpoints that Telemetry was made with; others are counted together
    received: float
    model_index: int = -1  # in the config's list of models; -1: the request names none that we know
    is_stream: bool = False
    path: Path = Path.NONE
    admitted: float = 0.0
    prefill_done: float = 0.0  # stays 0.0 when one worker serves the request as a whole
    first_byte: float = 0.0
    finished: float = 0.0
    status: int = 0  # as sent, or 499 if the client was gone before a head could be sent
    error_code: str | None = None  # BatonError.code; set also when a stream failed after its 200
    kv: Kv = Kv.NONE
    prefill_worker: str | None = None
    decode_worker: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    client: str | None = None  # name of the client's API key
    in_flight_cell: int = -1  # belongs to Telemetry

    def stages(self) -> tuple[float | None, float | None, float | None, float]:
        """Seconds per stage in the order of STAGES; None for a stage that was not completed.

        `decode_first_byte` starts where the leg that answers could start; an error is not such an answer.
        """
        admitted, prefill_done, first_byte = self.admitted, self.prefill_done, self.first_byte
        total = self.finished - self.received
        if not admitted:
            return None, None, None, total
        queue = admitted - self.received
        prefill = prefill_done - admitted if prefill_done else None
        is_answer = first_byte and self.status < 400
        decode = first_byte - (prefill_done or admitted) if is_answer else None
        return queue, prefill, decode, total
