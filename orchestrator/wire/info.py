"""What a worker says of itself at `GET /baton/info`. A worker without our plugin answers 404 there."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["prefill", "decode", "both"]
Encoding = Literal["json", "orjson", "msgpack"]
TokenIds = Literal["list", "base64", "bin"]

# Set on a leg whose body is msgpack. The content type stays application/json on purpose: FastAPI hands a
# body to Request.json() only for a JSON content type.
MSGPACK_HEADER = "X-Msgpack"
# Set on a prefill leg that wants the prompt's token ids: the form of them, "list" where it is absent. The two
# packed forms are little-endian int32, as a base64 string in JSON or as bin in a msgpack answer.
TOKEN_IDS_HEADER = "X-Token-Ids"  # noqa: S105  # no secret
TRANSPORT_ENV = "BATON_TRANSPORT"
# Where the variable is unset or empty, on either side. docs/transport.md has the measurements behind it.
DEFAULT_TRANSPORT: Encoding = "orjson"
# How long NIXL's progress thread waits between two looks; see `worker/nixl_thread.py`.
NIXL_DELAY_ENV = "BATON_NIXL_PROGRESS_DELAY_US"
DEFAULT_NIXL_DELAY_US = 1000  # NIXL rounds up to whole milliseconds, as `poll()` counts


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The announcement. Unknown fields are ignored, so newer workers can say more."""

    role: Role
    model: str
    decodes: list[Encoding]  # request encodings; "json" is always among them
    engine: str  # "vllm" or "sim"
    engine_version: str
    block_size: int | None = None  # tokens per KV block
    dtype: str | None = None
    max_model_len: int | None = None
    token_ids: list[TokenIds] = []  # the forms of a prompt's ids that it gives as prefill and takes as decode
