"""msgspec makes these of documents: requests, streams, answers.

They are not beside the code that reads them: that can be compiled, and mypyc would lose the keywords and
annotations that msgspec goes by.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

NULL = Raw(b"null")

# A JSON value that is there or not, and that nobody looks into.
Anything = bool | int | float | str | list[Raw] | dict[str, Raw]

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


# --- what answers are judged by (`judge.py`) ----------------------------------------------------


class EndedChoice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None


class Judged(msgspec.Struct):
    """Whatever the answer is, these fields mean the same."""

    object: str | None = None
    error: Anything | None = None
    kv_transfer_params: Anything | None = None  # they concern engines alone: hosts, ports, block ids
    ec_transfer_params: Anything | None = None

    def tells_error(self) -> bool:
        return self.error is not None or self.object == "error"

    def is_for_engines(self) -> bool:
        return self.kv_transfer_params is not None or self.ec_transfer_params is not None


class JudgedCompletion(Judged):
    """A whole chat or completion, or an event of one."""

    choices: list[EndedChoice] | None = None


# --- the usage of an answer (`usage.py`) --------------------------------------------------------


class UsageDetails(msgspec.Struct):
    cached_tokens: int | None = None
    created_cache_tokens: int | None = None


class AnswerUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: Any = None  # a number, which is only counted
    prompt_tokens_details: UsageDetails | None = None

    def told(self) -> tuple[object, object]:
        """Return what it says of the tokens of the prompt, and of the answer."""
        return self.prompt_tokens, self.completion_tokens


class ResponseUsageDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class PrefillUsage(AnswerUsage):
    """Each API has other names for what the prompt has, and for what was added to the prefix cache."""

    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    input_tokens_details: ResponseUsageDetails | None = None

    def created_tokens(self) -> int | None:
        if self.prompt_tokens_details is not None:
            return self.prompt_tokens_details.created_cache_tokens
        if self.input_tokens_details is not None:
            return self.input_tokens_details.cache_write_tokens
        return self.cache_creation_input_tokens

    def all_prompt_tokens(self) -> int | None:
        """Return how many tokens the prompt has; Messages does not count cached ones among its input."""
        if self.input_tokens is None:
            return self.prompt_tokens
        cached = (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        return self.input_tokens + cached


class AnswerWithUsage(msgspec.Struct):
    usage: AnswerUsage | None = None


class CompletionWithUsage(JudgedCompletion):
    usage: AnswerUsage | None = None


# --- objects that say what they are (`api/messages.py`, `api/responses.py`) ----------------------


class Typed(msgspec.Struct):
    type: str | None = None


# --- Anthropic's messages (`api/messages.py`) ---------------------------------------------------


class MessageUsage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: Any = None  # a number, which is only written down
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    def prompt_tokens(self) -> int:
        created, read = self.cache_creation_input_tokens, self.cache_read_input_tokens
        return self.input_tokens + (created or 0) + (read or 0)

    def told(self) -> tuple[object, object]:
        return self.prompt_tokens(), self.output_tokens


class MessageAnswer(Judged):
    type: str | None = None
    stop_reason: str | None = None
    usage: MessageUsage | None = None


class MessageStop(msgspec.Struct):
    stop_reason: str | None = None


class MessageDelta(msgspec.Struct):
    delta: MessageStop | None = None
    usage: MessageUsage | None = None


# --- responses (`api/responses.py`) -------------------------------------------------------------


class ResponseUsage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: Any = None  # a number, which is only written down
    input_tokens_details: ResponseUsageDetails | None = None

    def told(self) -> tuple[object, object]:
        return self.input_tokens, self.output_tokens


class ResponseAnswer(Judged):
    status: str | None = None
    usage: ResponseUsage | None = None


class ResponseEvent(msgspec.Struct):
    response: ResponseAnswer


# --- what a prefill worker answers (`nixl.py`) --------------------------------------------------


class PrefillAnswer(msgspec.Struct):
    kv_transfer_params: Raw = NULL
    usage: Raw = NULL


class PulledBlocks(msgspec.Struct):
    """A hand-off that has all that the puller needs; what else is in it is not looked at."""

    remote_engine_id: Raw
    remote_block_ids: Raw
    remote_request_id: Raw
    remote_host: Raw
    remote_port: Raw
    do_remote_prefill: bool
    remote_prefill_cached_tokens: int | msgspec.UnsetType = msgspec.UNSET


class PrefillChoice(msgspec.Struct):
    prompt_token_ids: Raw = NULL


class PrefillAnswerWithIds(PrefillAnswer):
    """vLLM gives the ids of a chat at the top, those of a completion with its choice."""

    prompt_token_ids: Raw = NULL
    choices: list[PrefillChoice] = []


class PackedAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None
    prompt_token_ids: bytes | None = None
    usage: Any = None


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
