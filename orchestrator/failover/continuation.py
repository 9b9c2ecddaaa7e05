"""This decides which streams can go on when their decode leg was lost, and what a new pair of workers is
asked.

The new legs are completions with token ids as their prompt: those of the prompt and those of what the client
has been sent. That is the same for chats and completions, and needs nothing but plain vLLM.

The rest of such a stream differs from that of one that was not cut:
- Sent text is tokenised again, unless the client asked for its token ids. `completion_tokens` and the limits
  then count these tokens. Where they are others than the model had chosen (text that begins with a space
  under SentencePiece, special tokens that text leaves out, bytes that are no UTF-8), it may choose other
  words.
- A seed begins anew; presence and frequency penalties and bad words do not know what was sent before the cut.
- Stop strings are found as ever: what may be the beginning of one has not been sent. But the text in front of
  it can end within a token, and no model has learned to go on there. A greedy one begins with the last word
  again, which is left out of the stream; if it says another one, the stream cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

from orchestrator.api.view import RequestView
from orchestrator.failover.stream import ContinuedStream, Envelope, ending
from orchestrator.failover.tokenize import Ids, decode_field, read_field
from orchestrator.failover.transcript import CannotContinue, Sent, Usage
from orchestrator.wire.codec import json_object
from orchestrator.wire.lax import lax_bool, lax_int

PATH = "/v1/completions"  # of the legs that go on

# Fields that mean the same in a chat and in a completion (vLLM 0.32).
CARRIED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "length_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "model",
        "presence_penalty",
        "priority",
        "repetition_penalty",
        "return_token_ids",
        "seed",
        "session_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_interval",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
        "user",
        "watermarking",
    }
)

_NULL = b"null"
_EMPTY = frozenset({_NULL, b"[]", b"{}", b'""'})

# Fields that have a state in the answer which a new worker does not get, or that make of it more than text;
# and the values with which they do not.
REFUSED: Mapping[str, frozenset[bytes]] = {
    "best_of": frozenset({_NULL, b"1"}),
    "function_call": frozenset({_NULL, b'"none"'}),
    "functions": _EMPTY,
    "include_reasoning": frozenset({_NULL, b"true"}),
    "logits_processors": _EMPTY,
    "logprob_token_ids": _EMPTY,
    "logprobs": frozenset({_NULL, b"false"}),
    "n": frozenset({_NULL, b"1"}),
    "repetition_detection": _EMPTY,
    "structured_outputs": _EMPTY,
    "suffix": _EMPTY,
    "thinking_token_budget": frozenset({_NULL, b"-1"}),
    "tools": _EMPTY,
    "top_logprobs": frozenset({_NULL, b"0"}),
    "truncate_prompt_tokens": _EMPTY,
    "vllm_xargs": _EMPTY,
}
_COUNTS = frozenset({"best_of", "n"})
_GUIDED = "guided_"  # what structured output was called before

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's; chats have no limit but the context


# Where words are longer than this, there are no spaces between them.
_MAX_WORD = 200
_GREEDY_BELOW = 1e-5  # vLLM's


class _Format(msgspec.Struct):
    type: str = ""


class _Message(msgspec.Struct):
    content: Raw = Raw(_NULL)


_FORMAT = msgspec.json.Decoder(_Format | None)
_MESSAGES = msgspec.json.Decoder(list[_Message])
_PARTS = msgspec.json.Decoder(list[_Format])
_STOP = msgspec.json.Decoder(str | list[str] | None)
_NUMBER = msgspec.json.Decoder(float | None, strict=False)
_json = msgspec.json.Encoder()


def replaceable(view: RequestView) -> str | None:
    """Return why no other worker could ever go on with the stream of this request; None if one can.

    It looks at the messages, so it is made for the moment of a loss, not for every request.
    """
    if view.whole_reason is not None:
        return view.whole_reason
    fields = {**view.shared, **view.own}
    for name in fields:
        if name.startswith(_GUIDED) or (name in REFUSED and not _says_nothing(name, fields[name])):
            return f"'{name}' was asked for"
    if not _is_plain_text(view.shared.get("response_format", Raw(_NULL))):
        return "structured output was asked for"
    return _reason_in(view.shared.get("messages"))


def _says_nothing(name: str, raw: Raw) -> bool:
    """Tell whether the field has a value with which it does nothing, however that is spelt."""
    try:
        value = lax_int(raw) if name in _COUNTS and bytes(raw) != _NULL else msgspec.json.decode(raw)
    except (ValueError, msgspec.DecodeError):
        return False
    return _json.encode(value) in REFUSED[name]


def _is_plain_text(response_format: Raw) -> bool:
    try:
        wanted = _FORMAT.decode(response_format)
    except msgspec.DecodeError:
        return False
    return wanted is None or wanted.type == "text"


def _reason_in(messages: Raw | None) -> str | None:
    if messages is None:
        return None
    try:
        has_media = not all(_is_text(message.content) for message in _MESSAGES.decode(messages))
    except msgspec.DecodeError:
        has_media = True
    return "a message has more in it than text" if has_media else None


def _is_text(content: Raw) -> bool:
    if memoryview(content)[0] != ord("["):
        return True
    return all(part.type == "text" for part in _PARTS.decode(content))


def text_to_go_on_from(view: RequestView, sent: Sent) -> str:
    """Return what of the sent text the new workers are given: all of it, unless it can end within a token.

    Raises `CannotContinue`.
    """
    if not (_holds_text_back(view) and _is_greedy(view)):
        return sent.text
    start = max(0, sent.text.rfind(" "))
    return sent.text if len(sent.text) - start > _MAX_WORD else sent.text[:start]


def _is_greedy(view: RequestView) -> bool:
    temperature = decode_field(_NUMBER, view.shared, "temperature")
    return temperature is not None and temperature < _GREEDY_BELOW


def _holds_text_back(view: RequestView) -> bool:
    """Tell whether workers hold back text that may begin a stop string; not if that is part of the answer."""
    keeps_stop = read_field(lax_bool, view.shared, "include_stop_str_in_output")
    return not keeps_stop and any(len(stop) > 1 for stop in _stops(view))


class Continuation(msgspec.Struct, frozen=True, kw_only=True):
    """A stream that was cut is described by this, with all that another worker needs to go on with it. The
    original view and hand-off count also for a stream that is cut again: what was sent then is of several
    workers.
    """

    view: RequestView  # the client's
    sent: Sent
    prompt: Ids
    said: Ids  # those that were sent, else those of `text_to_go_on_from`
    model_len: int | None = None  # the context in tokens; needed for chats without a limit
    cached_tokens: int | None = None  # what the first hand-off says that the client is to be told

    def rest(self) -> RequestView | None:
        """Return the request whose answer is the rest; None if nothing is left but the ending.

        Raises `CannotContinue` if a stop string could be missed or text lost.
        """
        if self.sent.finish_reason is not None or (left := self._tokens_left()) < 1:
            return None
        self._refuse_stops()
        shared, own = self._carried(self.view.shared), self._carried(self.view.own)
        shared["prompt"] = Raw(self.prompt.followed_by(self.said).json)
        own["max_tokens"] = _raw(left)
        if (least := read_field(lax_int, own, "min_tokens")) is not None:
            own["min_tokens"] = _raw(max(0, least - self.said.count))
        view = self.view
        return RequestView(
            shared,
            json_object(shared),
            own,
            _json.encode(own),
            view.model,
            view.is_stream,
            view.wants_usage,
            None,
        )

    def stream(self) -> ContinuedStream:
        """Return what makes the client's events of the answer to `rest`."""
        return ContinuedStream(
            self._envelope,
            self._usage,
            hides_usage=not self.view.wants_usage,
            cached_tokens=self.cached_tokens,
            again=self._again,
        )

    def ending(self) -> bytes:
        """Return what the client still gets if there is no rest."""
        usage = self._usage if self.view.wants_usage else None
        return ending(self._envelope, usage, cached_tokens=self.cached_tokens)

    @property
    def _again(self) -> str:
        """This is what the client has already and the new worker will say again."""
        if self.sent.ids is not None:
            return ""
        return self.sent.text[len(text_to_go_on_from(self.view, self.sent)) :]

    @property
    def _envelope(self) -> Envelope:
        return Envelope(self.sent)

    @property
    def _usage(self) -> Usage:
        return Usage(self.prompt.count, self.said.count)

    def _tokens_left(self) -> int:
        bounds = [bound for bound in (self._limit(), self._room()) if bound is not None]
        if not bounds:
            raise CannotContinue("the length of the model's context is not known")
        return min(bounds)

    def _limit(self) -> int | None:
        limit = read_field(lax_int, self.view.own, "max_tokens")
        if self.sent.is_chat:
            newer = read_field(lax_int, self.view.own, "max_completion_tokens")
            limit = limit if newer is None else newer
        elif limit is None:
            limit = _DEFAULT_COMPLETION_TOKENS
        return None if limit is None else limit - self.said.count

    def _room(self) -> int | None:
        return None if self.model_len is None else self.model_len - self.prompt.count - self.said.count

    def _carried(self, fields: Mapping[str, Raw]) -> dict[str, Raw]:
        """Return the fields that the new legs keep; those of a completion are the endpoint's own, whatever
        they are.
        """
        names = CARRIED & fields.keys() if self.sent.is_chat else fields.keys()
        return {name: fields[name] for name in names}

    def _refuse_stops(self) -> None:
        if _holds_text_back(self.view):
            if self.sent.ids:
                raise CannotContinue("its stop strings may hold text back whose token ids were sent")
        elif any(_begins(stop, self.sent.text) for stop in _stops(self.view)):
            raise CannotContinue("a stop string may have begun")


def ending_without_count(view: RequestView, sent: Sent, cached_tokens: int | None) -> bytes | None:
    """Return what a client still gets of a stream whose choice has ended; None if tokens are to be counted
    first.
    """
    if sent.finish_reason is None:
        return None
    needs_usage = view.wants_usage and not sent.has_final_usage
    if needs_usage and sent.usage is None:
        return None
    return ending(Envelope(sent), sent.usage if needs_usage else None, cached_tokens=cached_tokens)


def _stops(view: RequestView) -> list[str]:
    stop = decode_field(_STOP, view.own, "stop")
    return [stop] if isinstance(stop, str) else stop or []


def _begins(stop: str, text: str) -> bool:
    """Tell whether the text ends in the beginning of the stop string."""
    return any(text.endswith(stop[:length]) for length in range(1, len(stop)))


def _raw(value: object) -> Raw:
    return Raw(_json.encode(value))
