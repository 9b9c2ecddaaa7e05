"""A worker of ours has this beside vLLM's API: its announcement, and the end of a request.

    GET /baton/info  ->  200, `WorkerInfo`
    POST /v1/baton/end {"request_id": "<the name of a leg>"}  ->  202
    POST /v1/baton/begun {"request_id": "<the same>"}  ->  200, `Begun`

A leg has a name, which no other leg has: its `LEG_HEADER`, or its `x-request-id` if it has only that. The
engine makes the answer's `id` of `x-request-id`, which is the client's where the client gives one; several
clients may give the same.

A worker without our plugin answers 404 to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

Role = Literal["prefill", "decode", "both"]
Encoding = Literal["json", "orjson", "msgpack"]
TokenIdsForm = Literal["list", "base64", "bin"]  # how a prompt's token ids travel; see `TOKEN_IDS_HEADER`
Streams = Literal["http", "mux"]  # a connection for each leg, or one for many: `wire/streams.py`

# Set on a leg whose body is msgpack. The content type stays application/json on purpose: FastAPI hands a
# body to Request.json() only for a JSON content type.
MSGPACK_HEADER = "X-Msgpack"
# What our plugin's refusal says of a document that it does not take as msgpack, but may take as JSON. Nothing
# is wrong with the worker then.
DOCUMENT_REFUSED = "msgpack body refused"
# Set on a prefill leg that wants the prompt's token ids: the form of them, "list" where it is absent. The two
# packed forms are little-endian int32, as a base64 string in JSON or as bin in a msgpack answer.
TOKEN_IDS_HEADER = "X-Token-Ids"  # noqa: S105  # no secret
# Set on a leg whose `x-request-id` is not its name.
LEG_HEADER = "X-Baton-Leg"
TRANSPORT_ENV = "BATON_TRANSPORT"
# This holds where the variable is unset or empty, on either side. docs/transport.md has the measurements.
DEFAULT_TRANSPORT: Encoding = "orjson"
STREAMS_ENV = "BATON_STREAMS"
STREAMS: tuple[Streams, ...] = ("http", "mux")
# This holds where the variable is unset or empty, on either side. Legs share a connection if both say "mux".
DEFAULT_STREAMS: Streams = "http"
# The zone that a worker announces; unset or empty: none.
ZONE_ENV = "BATON_ZONE"
# What a worker announces as its deployment; unset or empty: none.
DEPLOYMENT_ENV = "BATON_DEPLOYMENT"
# How long NIXL's progress thread waits between two looks; see `worker/nixl_thread.py`.
NIXL_DELAY_ENV = "BATON_NIXL_PROGRESS_DELAY_US"
DEFAULT_NIXL_DELAY_US = 1000  # NIXL rounds up to whole milliseconds, as `poll()` counts
MOST_NIXL_DELAY_US = 1_000_000  # some transports of UCX need to be looked at now and then

# Sent to every worker as bearer token, and given by `baton up` to the workers it starts.
WORKER_KEY_ENV = "BATON_WORKER_API_KEY"
# What `baton up`, which has started the orchestrator, shows at its admin listener in place of a key.
RUN_KEY_ENV = "BATON_RUN_KEY"


def streams_from_env(environ: Mapping[str, str]) -> Streams:
    """Return what `BATON_STREAMS` says. Raises `ValueError` if there is no such value."""
    given = environ.get(STREAMS_ENV) or DEFAULT_STREAMS
    for known in STREAMS:
        if given == known:
            return known
    raise ValueError(f"{STREAMS_ENV} must be one of {', '.join(STREAMS)}, not {given!r}")


# Nobody's announcement is longer; a worker may be something else than it should be.
MAX_LABEL = 256
Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class KvEventsInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker publishes what becomes of its KV cache (`wire/kv_events.py`) at a ZeroMQ endpoint of its own.

    A host `*` in an endpoint is the worker's. Missed batches can be asked for at `replay_endpoint`.
    """

    endpoint: Label
    replay_endpoint: Label | None = None
    topic: Label = ""


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker announces this. Unknown fields are ignored, so newer workers can say more."""

    role: Role
    model: Label
    decodes: Annotated[
        list[Encoding], msgspec.Meta(max_length=16)
    ]  # of requests; "json" is always among them
    engine: Label  # "vllm" or "sim"
    engine_version: Label
    block_size: Count | None = None  # tokens per KV block
    kv_tokens: Count | None = None  # that fit into the KV cache of one engine
    data_parallel_size: Count | None = None  # so many engines are behind this server
    dtype: Label | None = None
    # What must fit between workers that hand KV caches over to each other: `wire/compatibility.py`.
    path: Label | None = None  # the model as the engine was told to load it
    revision: Label | None = None  # of the model's files
    deployment: Label | None = None  # what whoever started it calls all that was started together
    kv_dtype: Label | None = None
    tp: Count | None = None  # tensor parallel size
    connector: Label | None = None  # that hands KV caches over; "none" without one
    nixl_delay_us: Count | None = None  # NIXL's progress thread sleeps so long; 0: it never does
    max_model_len: Count | None = None
    # The forms of a prompt's ids that it gives as prefill and takes as decode.
    token_ids: Annotated[list[TokenIdsForm], msgspec.Meta(max_length=16)] = []
    # How legs may come to it; "http" always, whatever is here.
    streams: Annotated[list[Streams], msgspec.Meta(max_length=16)] = []
    zone: Label | None = None  # the part of the network that it is in
    kv_events: KvEventsInfo | None = None
    kv_lease_s: float | None = None  # as prefill it pins blocks that nobody pulls for so long


END_PATH = "/v1/baton/end"  # under /v1, where workers ask for their key


class EndRequest(msgspec.Struct):
    """It asks a worker to end a request that nobody wants any more, while its connection stays open.

    vLLM's own ways, a closed connection and `/inference/v1/abort_requests`, drop an answer that its engine
    has made and its server has not yet written; that of a prefill names pinned blocks. This one does not: the
    request is answered in any case, with what the engine made, or with `finish_reason: abort` if that was not
    all.
    """

    request_id: str  # the name of the leg


BEGUN_PATH = "/v1/baton/begun"


class Begun(msgspec.Struct):
    """It says whether the engine has made the first token of a request, which a whole answer does not show.

    A request of a decode leg that has begun has its KV cache: the blocks were pulled before.
    """

    begun: bool


def end_body(request_id: str) -> bytes:
    """Return the body of both questions."""
    return msgspec.json.encode(EndRequest(request_id))
