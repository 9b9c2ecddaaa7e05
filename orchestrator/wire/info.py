"""A worker of ours has this beside vLLM's API: its announcement, and the end of a request.

    GET /baton/info  ->  200, `WorkerInfo`
    POST /v1/baton/end {"request_id": "<the x-request-id that the leg had>"}  ->  202

A worker without our plugin answers 404 to both.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["prefill", "decode", "both"]
Encoding = Literal["json", "orjson", "msgpack"]
TokenIdsForm = Literal["list", "base64", "bin"]  # how a prompt's token ids travel; see `TOKEN_IDS_HEADER`

# Set on a leg whose body is msgpack. The content type stays application/json on purpose: FastAPI hands a
# body to Request.json() only for a JSON content type.
MSGPACK_HEADER = "X-Msgpack"
# Set on a prefill leg that wants the prompt's token ids: the form of them, "list" where it is absent. The two
# packed forms are little-endian int32, as a base64 string in JSON or as bin in a msgpack answer.
TOKEN_IDS_HEADER = "X-Token-Ids"  # noqa: S105  # no secret
TRANSPORT_ENV = "BATON_TRANSPORT"
# This holds where the variable is unset or empty, on either side. docs/transport.md has the measurements.
DEFAULT_TRANSPORT: Encoding = "orjson"
# How long NIXL's progress thread waits between two looks; see `worker/nixl_thread.py`.
NIXL_DELAY_ENV = "BATON_NIXL_PROGRESS_DELAY_US"
DEFAULT_NIXL_DELAY_US = 1000  # NIXL rounds up to whole milliseconds, as `poll()` counts

# Sent to every worker as bearer token, and given by `baton up` to the workers it starts.
WORKER_KEY_ENV = "BATON_WORKER_API_KEY"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker announces this. Unknown fields are ignored, so newer workers can say more."""

    role: Role
    model: str
    decodes: list[Encoding]  # request encodings; "json" is always among them
    engine: str  # "vllm" or "sim"
    engine_version: str
    block_size: int | None = None  # tokens per KV block
    kv_tokens: int | None = None  # that fit into the KV cache
    dtype: str | None = None
    max_model_len: int | None = None
    token_ids: list[
        TokenIdsForm
    ] = []  # the forms of a prompt's ids that it gives as prefill and takes as decode


END_PATH = "/v1/baton/end"  # under /v1, where workers ask for their key


class EndRequest(msgspec.Struct):
    """It asks a worker to end a request that nobody wants any more, while its connection stays open.

    vLLM's own ways, a closed connection and `/inference/v1/abort_requests`, drop an answer that its engine
    has made and its server has not yet written; that of a prefill names pinned blocks. This one does not: the
    request is answered in any case, with what the engine made, or with `finish_reason: abort` if that was not
    all.
    """

    request_id: str


def end_body(request_id: str) -> bytes:
    return msgspec.json.encode(EndRequest(request_id))
