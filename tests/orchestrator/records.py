"""Records as a finished request leaves them."""

from __future__ import annotations

from typing import Any

from orchestrator.telemetry.record import Path, RequestRecord
from orchestrator.wire.usage import Kv

ANSWERED: dict[str, Any] = {
    "request_id": "req-1",
    "endpoint": "/v1/chat/completions",
    "path": Path.DISAGGREGATED,
    "received": 100.0,
    "admitted": 100.5,
    "prefill_done": 101.5,
    "first_byte": 101.75,
    "finished": 105.0,
    "status": 200,
    "kv": Kv.TRANSFERRED,
}


def request_record(
    request_id: str = "r", endpoint: str = "/v1/completions", received: float = 0.0, **fields: Any
) -> RequestRecord:
    made = RequestRecord(request_id, endpoint, received)
    for name, value in fields.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made
