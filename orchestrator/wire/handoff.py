"""The baton: what the prefill worker's answer says about the KV cache it holds for the decode worker."""

from __future__ import annotations

import msgspec
from msgspec import Raw

# Withheld from the decode worker. Without it that worker reports its own count of cached tokens, which
# equals the prompt if and only if the KV arrived; with it, it would repeat this number in either case.
CACHED_TOKENS_KEY = "remote_prefill_cached_tokens"

# What the puller needs to find the blocks (vLLM's NIXL connector, pull mode).
# Its engine core dies of a decode leg in which one is missing.
_REQUIRED = ("remote_engine_id", "remote_block_ids", "remote_request_id", "remote_host", "remote_port")


class InvalidHandoff(ValueError):
    """The prefill worker answered without a usable hand-off; a decode leg must not be sent."""


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, Raw] | None = None


class Handoff(msgspec.Struct, gc=False):
    """Names KV blocks that the prefill worker pins for the decode worker: good for one use, for 30 s."""

    params: bytes  # for the decode leg, a JSON object, unknown keys kept
    prefill_cached_tokens: int | None  # what the client's usage must say


_ANSWER = msgspec.json.Decoder(_PrefillAnswer)
_json = msgspec.json.Encoder()
_NULL = Raw(b"null")
_COUNT = msgspec.json.Decoder(int | None)


def handoff_from(answer: bytes) -> Handoff:
    """Read a prefill worker's answer. Raises `InvalidHandoff`."""
    try:
        params = _ANSWER.decode(answer).kv_transfer_params
        if not params:
            raise InvalidHandoff("the prefill worker answered without kv_transfer_params")
        cached = params.pop(CACHED_TOKENS_KEY, None)
        _require(params)
        return Handoff(_json.encode(params), None if cached is None else _COUNT.decode(cached))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidHandoff("the prefill worker's answer cannot be read") from error


def _require(params: dict[str, Raw]) -> None:
    if bytes(params.get("do_remote_prefill", b"")) != b"true":
        raise InvalidHandoff("the prefill worker did not keep the KV cache")
    for key in _REQUIRED:
        raw = params.get(key, _NULL)
        if len(raw) == 4 and bytes(raw) == b"null":
            raise InvalidHandoff(f"the prefill worker's hand-off has no {key}")
