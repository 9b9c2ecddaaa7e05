"""These are the header fields that pass between clients and workers; all others end here.

A worker trusts the orchestrator. So a field of a client's is named here before a worker gets it, with what
vLLM (0.32) makes of it. The worker's key and what tells of encodings are the orchestrator's own and never a
client's. `x-request-id` goes to the worker that answers only (`flow._client_id`): what a prefill worker is
told becomes part of what it calls the blocks that it pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# From the client to both workers.
TO_WORKERS: Final[Mapping[bytes, str]] = {
    b"accept": "says which form of an embedding the client wants",
    b"traceparent": "continues the client's trace",
    b"tracestate": "continues the client's trace",
    b"x-session-id": "names the session, as the field `session_id` does",
    b"x-vllm-priority": "is the priority, before the field `priority`, where the scheduler goes by it",
    b"endpoint-load-metrics-format": "asks for the worker's load with an answer that is not streamed",
}

# With the option `relay_data_parallel_rank` only: it goes past the balance of load, within a worker as well.
DATA_PARALLEL_RANK: Final = b"x-data-parallel-rank"

# From the worker that answers to the client, beside `content-type`.
LOAD_METRICS: Final = b"endpoint-load-metrics"


def relayed_to_workers(*, has_rank: bool) -> frozenset[bytes]:
    """Return the names of the client's fields that workers get; `has_rank` if a client may name a rank."""
    return frozenset([*TO_WORKERS, DATA_PARALLEL_RANK] if has_rank else TO_WORKERS)
