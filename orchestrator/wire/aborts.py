"""How a vLLM worker is asked to end a request whose connection stays open (its call since 0.32)."""

from __future__ import annotations

import msgspec

PATH = "/inference/v1/abort_requests"

# How vLLM names a request in its engine, by the path that it came by and the `x-request-id` that it had.
_NAMES = {"/v1/chat/completions": "chatcmpl-{}", "/v1/completions": "cmpl-{}-0"}


def abort_body(path: str, request_id: str) -> bytes | None:
    """None for paths whose requests have other names."""
    name = _NAMES.get(path)
    return None if name is None else msgspec.json.encode({"request_ids": [name.format(request_id)]})
