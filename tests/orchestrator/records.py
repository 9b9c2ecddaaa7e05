"""Records as a finished request leaves them."""

from __future__ import annotations

from orchestrator.record import RequestRecord


def request_record(
    request_id: str = "r", endpoint: str = "/v1/completions", received: float = 0.0, **fields: object
) -> RequestRecord:
    made = RequestRecord(request_id, endpoint, received)
    for name, value in fields.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made
