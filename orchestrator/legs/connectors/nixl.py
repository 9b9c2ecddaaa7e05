"""vLLM's NIXL connector pulls: prefill answers with the addresses of its blocks, decode reads them.

The prefill worker pins the blocks until the decode worker has read them, or until its lease ends (30 s).
"""

from __future__ import annotations

from operator import itemgetter
from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.legs.connectors.base import Connector, Handoff, InvalidHandoff, TokenIds
from orchestrator.wire.shapes import (
    NULL,
    PackedAnswer,
    PrefillAnswer,
    PrefillAnswerWithIds,
    PulledBlocks,
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
_required: Final = itemgetter(*_REQUIRED)  # in one step: a look-up of our own for each costs twice as much


_TRUE: Final = Raw(b"true")
_CACHED: Final = b'"%b"' % CACHED_TOKENS_KEY.encode()
_ENDS: Final[tuple[bytes, ...]] = (b",", b"}")  # of a number in an object
_ANSWER: Final = msgspec.json.Decoder(PrefillAnswer)
_PULLED: Final = msgspec.json.Decoder(PulledBlocks)
_PARAMS: Final = msgspec.json.Decoder(dict[str, Raw] | None)
_ANSWER_WITH_IDS: Final = msgspec.json.Decoder(PrefillAnswerWithIds)
_PACKED_ANSWER: Final = msgspec.msgpack.Decoder(PackedAnswer)
_COUNT: Final = msgspec.json.Decoder(int | None)
_json: Final = msgspec.json.Encoder()

# Asks vLLM to keep the prompt's blocks when it has answered.
_KEEP_KV: Final = _json.encode(
    {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
)


class Nixl(Connector):
    """Prefill goes first, then decode with what prefill has answered."""

    def __init__(self) -> None:
        super().__init__("nixl", sends_both_at_once=False)

    def prefill_params(self, transfer: str) -> bytes:
        return _KEEP_KV

    def read(self, answer: bytes, *, is_packed: bool, has_ids: bool) -> Handoff:
        return handoff_from_msgpack(answer) if is_packed else handoff_from(answer, has_ids=has_ids)

    def pair(self, transfer: str, host: str, port: int | None) -> Handoff:
        raise InvalidHandoff("NIXL in pull mode needs the prefill worker's answer")


def handoff_from(answer: bytes, *, has_ids: bool = False) -> Handoff:
    """Read a prefill worker's answer, with the token ids if it was asked for them.

    Raises `InvalidHandoff`.
    """
    try:
        if has_ids:
            document = _ANSWER_WITH_IDS.decode(answer)
            return _handoff(bytes(document.kv_transfer_params), _ids_of(document), document.usage)
        plain = _ANSWER.decode(answer)
        return _handoff(bytes(plain.kv_transfer_params), None, plain.usage)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidHandoff("the prefill worker's answer cannot be read") from error


def handoff_from_msgpack(answer: bytes) -> Handoff:
    """Read an answer in msgpack, whose ids are packed. Raises `InvalidHandoff`."""
    try:
        document = _PACKED_ANSWER.decode(answer)
        params = document.kv_transfer_params or {}
        raw = {name: Raw(_json.encode(value)) for name, value in params.items()}
        ids = document.prompt_token_ids
        usage = Raw(_json.encode(document.usage))
        return _checked(raw, TokenIds(packed=ids) if ids else None, usage)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidHandoff("the prefill worker's answer cannot be read") from error


def _handoff(params: bytes, ids: TokenIds | None, usage: Raw) -> Handoff:
    """Pass the worker's own bytes on if they are as vLLM writes them: to take them apart, and put all but one
    of them together again, costs three times as much.
    """
    try:
        pulled = _PULLED.decode(params)
    except msgspec.MsgspecError:  # something is missing, or unusual
        return _checked(_PARAMS.decode(params), ids, usage)
    tokens = pulled.remote_prefill_cached_tokens
    if pulled.do_remote_prefill and isinstance(tokens, int) and params.find(b"null") < 0:
        kept = _without_cached(params, tokens)
        if kept is not None:
            return Handoff(kept, tokens, ids, usage)
    return _checked(_PARAMS.decode(params), ids, usage)


def _without_cached(params: bytes, tokens: int) -> bytes | None:
    """Cut the number of cached tokens out, by its place; None if that is not beyond doubt: where nothing is
    escaped its key is found as a key, once.
    """
    before, _, behind = params.partition(_CACHED)
    number = b":%d" % tokens
    end = len(number)
    is_it = before.endswith(b",") and behind.startswith(number) and behind[end : end + 1] in _ENDS
    if is_it and behind.find(_CACHED) < 0 and params.find(b"\\") < 0:
        return before[:-1] + behind[end:]
    return None


def _checked(params: dict[str, Raw] | None, ids: TokenIds | None, usage: Raw) -> Handoff:
    if not params:
        raise InvalidHandoff("the prefill worker answered without kv_transfer_params")
    cached = params.pop(CACHED_TOKENS_KEY, NULL)
    _require(params)
    return Handoff(_json.encode(params), None if cached is NULL else _COUNT.decode(cached), ids, usage)


def _require(params: dict[str, Raw]) -> None:
    if params.get("do_remote_prefill") != _TRUE:
        raise InvalidHandoff("the prefill worker did not keep the KV cache")
    try:
        is_complete = NULL not in _required(params)
    except KeyError:
        is_complete = False
    if not is_complete:
        missing = next(key for key in _REQUIRED if params.get(key, NULL) == NULL)
        raise InvalidHandoff(f"the prefill worker's hand-off has no {missing}")


def _ids_of(document: PrefillAnswerWithIds) -> TokenIds | None:
    ids = bytes(document.prompt_token_ids)
    if ids == b"null" and document.choices:
        ids = bytes(document.choices[0].prompt_token_ids)
    return None if ids == b"null" else TokenIds(json=ids)
