"""What msgspec makes of documents: requests, hand-offs, answers.

Not beside the code that reads them: that can be compiled, and mypyc would lose the keywords and annotations
that msgspec goes by.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from orchestrator.wire.codec import Parts

NULL = Raw(b"null")

# --- requests (`view.py`) -----------------------------------------------------------------------


class RequestView(msgspec.Struct, gc=False):
    """A request as the orchestrator sees it; the values are the client's own bytes. Not changed once made."""

    shared: dict[str, Raw]  # the fields that all legs share
    common: Parts  # the same as one JSON object
    own: dict[str, Raw]  # the others (`OWN`)
    own_json: bytes  # the same as one JSON object
    model: str
    is_stream: bool
    wants_usage: bool  # the client asked for the usage event of a stream
    whole_reason: str | None  # why no hand-off is possible; None if the request can go in two legs


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


# --- a stream's first events (`sse.py`) ---------------------------------------------------------


class Delta(msgspec.Struct, omit_defaults=True):
    role: str
    content: str | None = None


class DeltaChoice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None

    def is_empty(self) -> bool:
        return not self.delta.content and self.finish_reason is None


class DeltaChunk(msgspec.Struct):
    choices: list[DeltaChoice]


# --- the usage of an answer (`usage.py`) --------------------------------------------------------


class UsageDetails(msgspec.Struct):
    cached_tokens: int | None = None


class AnswerUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: UsageDetails | None = None


class AnswerWithUsage(msgspec.Struct):
    usage: AnswerUsage | None = None


# --- what a prefill worker answers (`handoff.py`) -----------------------------------------------


class TokenIds(msgspec.Struct, gc=False):
    """The prompt's token ids as the prefill worker gave them; nobody here looks into them."""

    json: bytes = b""  # a list, or a base64 string of little-endian int32; b"" if packed
    packed: bytes = b""  # little-endian int32

    @property
    def is_list(self) -> bool:
        return self.json.startswith(b"[")


class Handoff(msgspec.Struct, gc=False):
    """Names KV blocks that the prefill worker pins for the decode worker: good for one use, for 30 s."""

    params: bytes  # for the decode leg, a JSON object, unknown keys kept
    prefill_cached_tokens: int | None  # what the client's usage must say
    token_ids: TokenIds | None = None


class PrefillAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, Raw] | None = None


class PrefillChoice(msgspec.Struct):
    prompt_token_ids: Raw = NULL


class PrefillAnswerWithIds(PrefillAnswer):
    """vLLM gives the ids of a chat at the top, those of a completion with its choice."""

    prompt_token_ids: Raw = NULL
    choices: list[PrefillChoice] = []


class PackedAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None
    prompt_token_ids: bytes | None = None


# --- messages of a chat (`legs.py`) -------------------------------------------------------------


class Message(msgspec.Struct):
    content: Raw = NULL
    tool_calls: Raw = NULL


class MessagePart(msgspec.Struct):
    type: str = ""
