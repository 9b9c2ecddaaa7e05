"""A prompt's token ids go from the prefill to the decode worker, so that it is tokenised once.

Packed ids are little-endian int32: bytes in msgpack, base64 in JSON. Lists are vLLM's own and not touched.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy

from orchestrator.wire.info import TokenIdsForm

PARAMS_KEY = "kv_transfer_params"
IDS_KEY = "prompt_token_ids"
PLACE = f"{PARAMS_KEY}.{IDS_KEY}"

LIMITS_KEY = "baton_token_limits"  # in an application's state: its `Limits`, if it takes packed ids
WANTED_KEY = "baton_token_ids"  # in a request's state: its `RequestedIds`, if it asked for packed ids

_DTYPE = numpy.dtype("<i4")
_ENCODINGS: Mapping[TokenIdsForm, tuple[Callable[[Any], bytes], str]] = {
    "base64": (msgspec.json.encode, "application/json"),  # which writes bytes as base64
    "bin": (msgspec.msgpack.encode, "application/msgpack"),
}

_Create = Callable[..., Awaitable[Any]]


class BadTokenIds(ValueError):
    """Packed ids cannot be a prompt. The text says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    vocab_size: int
    max_tokens: int  # of a prompt


@dataclass(slots=True)
class RequestedIds:
    """A request asked for this packed form; the ids are here once its answer is there."""

    form: TokenIdsForm
    packed: bytes | None = None


def pack(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def unpack(packed: str | bytes, limits: Limits) -> list[int]:
    """Return the ids in `packed`, a string being base64. Raises `BadTokenIds`."""
    data = _from_base64(packed, limits) if isinstance(packed, str) else packed
    if not data or len(data) % _DTYPE.itemsize:
        raise BadTokenIds(f"{PLACE} has {len(data)} bytes, which is no positive multiple of 4")
    numbers = numpy.frombuffer(data, _DTYPE)
    if len(numbers) > limits.max_tokens:
        raise BadTokenIds(
            f"{PLACE} has {len(numbers)} ids; the model's context is {limits.max_tokens} tokens"
        )
    for extreme in (int(numbers.min()), int(numbers.max())):
        if not 0 <= extreme < limits.vocab_size:
            raise BadTokenIds(f"{PLACE}: token id {extreme} is out of vocabulary")
    ids: list[int] = numbers.tolist()
    return ids


def _from_base64(text: str, limits: Limits) -> bytes:
    if len(text) > 6 * (limits.max_tokens + 1):  # base64 has 5.4 characters for an id
        raise BadTokenIds(f"{PLACE} is too long; the model's context is {limits.max_tokens} tokens")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadTokenIds(f"{PLACE} is not base64: {error}") from error


# --- requests -------------------------------------------------------------------------------------------


def unpack_in(document: Any, limits: Limits, *, is_completion: bool) -> None:
    """Put a list where a decode leg has packed ids. Raises `BadTokenIds`, and changes nothing then.

    vLLM's completions do not look into the hand-off: there the ids become the prompt.
    """
    params = document.get(PARAMS_KEY) if isinstance(document, dict) else None
    if not isinstance(params, dict) or not isinstance(packed := params.get(IDS_KEY), str | bytes):
        return
    params[IDS_KEY] = unpack(packed, limits)
    if is_completion:
        document["prompt"] = params.pop(IDS_KEY)


# --- answers --------------------------------------------------------------------------------------------


def encode_answer(document: dict[str, Any], form: TokenIdsForm, packed: bytes) -> tuple[bytes, str]:
    """Return the body and the content type of an answer with these ids."""
    encode, content_type = _ENCODINGS[form]
    return encode(document | {IDS_KEY: packed}), content_type


def packing(create: _Create) -> _Create:
    """Wrap vLLM's `create_chat_completion` or `create_completion`: it takes the ids out of the answer, which
    is not JSON yet, and leaves them packed in the state of a request that wants them so.
    """

    @functools.wraps(create)
    async def create_and_pack(request: Any, raw_request: Any = None) -> Any:
        answer = await create(request, raw_request)
        wanted = None if raw_request is None else requested_by(raw_request.state)
        if wanted is not None and hasattr(answer, "choices"):  # no stream, no error
            wanted.packed = _take_ids(answer)
        return answer

    return create_and_pack


def requested_by(state: object) -> RequestedIds | None:
    """Return what a request asked for; `state` is the request's."""
    return getattr(state, WANTED_KEY, None)


def _take_ids(answer: Any) -> bytes | None:
    """Take the ids out of an answer: a chat's are at the top level, a completion's in its choices."""
    holders = [answer, *answer.choices]
    found = [ids for holder in holders if (ids := getattr(holder, IDS_KEY, None))]
    if not found:
        return None
    for holder in holders:
        for name in (IDS_KEY, "token_ids"):
            if getattr(holder, name, None) is not None:
                setattr(holder, name, None)
    return pack(found[0])
