"""msgspec makes these of documents: requests, streams, answers.

They are not beside the code that reads them: that can be compiled, and mypyc would lose the keywords and
annotations that msgspec goes by.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

NULL = Raw(b"null")

# --- requests (`view.py`) -----------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RoutedOwn(msgspec.Struct):
    """These are the routed fields in which a request's legs differ, in one pass, as nearly all clients write
    them.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class AnswerFields(msgspec.Struct):
    """What a request asks of its answer (`refusable.py`)."""

    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None


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


# --- what a prefill worker answers (`nixl.py`) --------------------------------------------------


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


# --- a refusal (`retry.py`) ---------------------------------------------------------------------


class RefusalError(msgspec.Struct):
    type: str = ""


class Refusal(msgspec.Struct):
    error: RefusalError


# --- messages of a chat (`bodies.py`) -----------------------------------------------------------


class Message(msgspec.Struct):
    content: Raw = NULL
    tool_calls: Raw = NULL


class MessagePart(msgspec.Struct):
    type: str = ""
