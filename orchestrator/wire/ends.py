"""How a worker of ours is asked to end a request that nobody wants any more, while its connection stays open.

    POST /v1/baton/end {"request_id": "<the x-request-id that the leg had>"}  ->  202

vLLM's own ways, a closed connection and `/inference/v1/abort_requests`, drop an answer that its engine has
made and its server has not yet written; that of a prefill names pinned blocks. This one does not: the request
is answered in any case, with what the engine made, or with `finish_reason: abort` if that was not all.
"""

from __future__ import annotations

import msgspec

PATH = "/v1/baton/end"  # under /v1, where workers ask for their key


class EndRequest(msgspec.Struct):
    request_id: str


def end_body(request_id: str) -> bytes:
    return msgspec.json.encode(EndRequest(request_id))
