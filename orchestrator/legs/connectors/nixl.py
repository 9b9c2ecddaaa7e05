"""The baton: what the prefill worker's answer says about the KV cache it holds for the decode worker."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.wire.shapes import (
    NULL,
    PackedAnswer,
    PrefillAnswer,
    PrefillAnswerWithIds,
)

# Withheld from the decode worker. Without it that worker reports its own count of cached tokens, which
# equals the prompt if and only if the KV arrived; with it, it would repeat this number in either case.
CACHED_TOKENS_KEY: Final = "remote_prefill_cached_tokens"

# What the puller needs to find the blocks (vLLM's NIXL connector, pull mode).
# Its engine core dies of a decode leg in which one is missing.
_REQUIRED: Final[tuple[str, ...]] = (
    "remote_engine_id",
    "remote_block_ids",
    "remote_request_id",
    "remote_host",
    "remote_port",
)


class InvalidHandoff(ValueError):
    """The prefill worker answered without a usable hand-off; a decode leg must not be sent."""


class TokenIds:
    """The prompt's token ids as the prefill worker gave them; nobody here looks into them."""

    __slots__ = ("json", "packed")

    def __init__(self, json: bytes = b"", packed: bytes = b"") -> None:
        """`json`: a list, or a base64 string of little-endian int32; b"" if they are `packed`: the same int32
        as they are.
        """
        self.json = json
        self.packed = packed

    @property
    def is_list(self) -> bool:
        return self.json.startswith(b"[")


class Handoff:
    """Names KV blocks that the prefill worker pins for the decode worker: good for one use, for 30 s."""

    __slots__ = ("params", "prefill_cached_tokens", "token_ids")

    def __init__(
        self, params: bytes, prefill_cached_tokens: int | None, token_ids: TokenIds | None = None
    ) -> None:
        """`params`: for the decode leg, a JSON object, unknown keys kept. `prefill_cached_tokens`: what the
        client's usage must say.
        """
        self.params = params
        self.prefill_cached_tokens = prefill_cached_tokens
        self.token_ids = token_ids


_TRUE: Final = Raw(b"true")
_ANSWER: Final = msgspec.json.Decoder(PrefillAnswer)
_ANSWER_WITH_IDS: Final = msgspec.json.Decoder(PrefillAnswerWithIds)
_PACKED_ANSWER: Final = msgspec.msgpack.Decoder(PackedAnswer)
_COUNT: Final = msgspec.json.Decoder(int | None)
_json: Final = msgspec.json.Encoder()


def handoff_from(answer: bytes, *, has_ids: bool = False) -> Handoff:
    """Read a prefill worker's answer, with the token ids if it was asked for them.

    Raises `InvalidHandoff`.
    """
    try:
        if not has_ids:
            return _handoff(_ANSWER.decode(answer).kv_transfer_params, None)
        document = _ANSWER_WITH_IDS.decode(answer)
        return _handoff(document.kv_transfer_params, _ids_of(document))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidHandoff("the prefill worker's answer cannot be read") from error


def handoff_from_msgpack(answer: bytes) -> Handoff:
    """The same for an answer in msgpack, whose ids are packed. Raises `InvalidHandoff`."""
    try:
        document = _PACKED_ANSWER.decode(answer)
        params = document.kv_transfer_params or {}
        raw = {name: Raw(_json.encode(value)) for name, value in params.items()}
        ids = document.prompt_token_ids
        return _handoff(raw, TokenIds(packed=ids) if ids else None)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidHandoff("the prefill worker's answer cannot be read") from error


def _handoff(params: dict[str, Raw] | None, ids: TokenIds | None) -> Handoff:
    if not params:
        raise InvalidHandoff("the prefill worker answered without kv_transfer_params")
    cached = params.pop(CACHED_TOKENS_KEY, NULL)
    _require(params)
    return Handoff(_json.encode(params), None if cached is NULL else _COUNT.decode(cached), ids)


def _require(params: dict[str, Raw]) -> None:
    if params.get("do_remote_prefill") != _TRUE:
        raise InvalidHandoff("the prefill worker did not keep the KV cache")
    for key in _REQUIRED:
        if params.get(key, NULL) == NULL:
            raise InvalidHandoff(f"the prefill worker's hand-off has no {key}")


def _ids_of(document: PrefillAnswerWithIds) -> TokenIds | None:
    ids = bytes(document.prompt_token_ids)
    if ids == b"null" and document.choices:
        ids = bytes(document.choices[0].prompt_token_ids)
    return None if ids == b"null" else TokenIds(json=ids)
