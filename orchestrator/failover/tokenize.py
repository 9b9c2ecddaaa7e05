"""A stream that goes on needs token ids: from who has told them already, else from a worker's `/tokenize`."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from orchestrator.api.view import RequestView
from orchestrator.failover.transcript import CannotContinue, Sent
from orchestrator.legs.connectors.base import TokenIds

PATH = "/tokenize"

# What of a chat decides its prompt, next to the messages, and has the same name at `/tokenize`.
_OF_TEMPLATE = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "messages",
    }
)
_NULL = b"null"
_T = TypeVar("_T")


class _Tokens(msgspec.Struct):
    tokens: Raw
    max_model_len: int | None = None


_TOKENS = msgspec.json.Decoder(_Tokens)
_KWARGS = msgspec.json.Decoder(dict[str, Raw] | None)
_json = msgspec.json.Encoder()


class Ids(msgspec.Struct, frozen=True):
    """Token ids are kept as they are written, for nobody here looks into them."""

    json: bytes  # a list
    count: int

    def followed_by(self, more: Ids) -> Ids:
        if not (self.count and more.count):
            return self if self.count else more
        joined = b"%b,%b" % (self.json.rstrip()[:-1], more.json.lstrip()[1:])
        return Ids(joined, self.count + more.count)


def ids_of(numbers: Sequence[int]) -> Ids:
    return Ids(_json.encode(numbers), len(numbers))


def known_prompt_ids(view: RequestView, sent: Sent, from_prefill: TokenIds | None) -> Ids | None:
    """Return the prompt's ids, if somebody has told them; `from_prefill` are those of the hand-off."""
    if sent.prompt_ids is not None:
        return _ids_in(sent.prompt_ids)
    if not sent.is_chat and memoryview(view.shared["prompt"])[0] == ord("["):
        return _ids_in(bytes(view.shared["prompt"]))
    return None if from_prefill is None else _ids_from(from_prefill)


def known_sent_ids(sent: Sent) -> Ids | None:
    """Return the ids of what was sent, if the client asked for them."""
    return None if sent.ids is None else ids_of(sent.ids)


def tokenize_prompt(view: RequestView, sent: Sent, model: str) -> bytes:
    """Return the body with which a worker, whose name for the model this is, tells the prompt's ids."""
    if sent.is_chat:
        return _json.encode(_chat_to_tokenize(view.shared) | {"model": model})
    fields = {name: view.shared[name] for name in ("prompt", "add_special_tokens") if name in view.shared}
    return _json.encode(fields | {"model": model})


def tokenize_text(text: str, model: str) -> bytes:
    """Return the body with which a worker tells the ids of what was sent."""
    return _json.encode({"model": model, "prompt": text, "add_special_tokens": False})


def tokenized(answer: bytes) -> tuple[Ids, int | None]:
    """Read a worker's answer to one of these: the ids and its context length. Raises `CannotContinue`."""
    try:
        document = _TOKENS.decode(answer)
        return _ids_in(bytes(document.tokens)), document.max_model_len
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CannotContinue("the worker's token ids cannot be read") from error


def _chat_to_tokenize(shared: Mapping[str, Raw]) -> dict[str, Any]:
    """Return a chat's fields for `/tokenize`, which does not know two that vLLM's chats put into their
    template's arguments.
    """
    fields: dict[str, Any] = {name: shared[name] for name in _OF_TEMPLATE & shared.keys()}
    moved = {name: shared[name] for name in ("documents", "reasoning_effort") if _is_given(name, shared)}
    if moved:
        arguments = decode_field(_KWARGS, shared, "chat_template_kwargs") or {}
        if "reasoning_effort" in moved:
            arguments.setdefault("enable_thinking", _raw(bytes(moved["reasoning_effort"]) != b'"none"'))
        fields["chat_template_kwargs"] = arguments | moved
    return fields


def _is_given(name: str, fields: Mapping[str, Raw]) -> bool:
    return name in fields and bytes(fields[name]) != _NULL


def _ids_in(json: bytes) -> Ids:
    """Read the ids of a JSON list. Raises `CannotContinue` if it is none."""
    inside = json.strip()
    if not inside.startswith(b"["):
        raise CannotContinue("the token ids are no list")
    return Ids(inside, inside.count(b",") + 1 if inside[1:-1].strip() else 0)


def _ids_from(ids: TokenIds) -> Ids:
    if ids.is_list:
        return _ids_in(ids.json)
    try:
        packed = ids.packed or base64.b64decode(ids.json.strip(b'"'), validate=True)
        return ids_of(struct.unpack(f"<{len(packed) // 4}i", packed))
    except (ValueError, struct.error) as error:
        raise CannotContinue("the prompt's token ids cannot be read") from error


def decode_field(decoder: msgspec.json.Decoder[_T], fields: Mapping[str, Raw], name: str) -> _T:
    """Decode a field, which may be null or missing. Raises `CannotContinue` if it has another type."""
    try:
        return decoder.decode(fields.get(name, _NULL))
    except msgspec.DecodeError as error:
        raise CannotContinue(f"'{name}' cannot be read") from error


def read_field(read: Callable[[Raw], _T], fields: Mapping[str, Raw], name: str) -> _T | None:
    """Read a field as a worker does; None if it is null or missing. Raises as `decode_field` does."""
    raw = fields.get(name)
    if raw is None or bytes(raw) == _NULL:
        return None
    try:
        return read(raw)
    except ValueError as error:
        raise CannotContinue(f"'{name}' cannot be read") from error


def _raw(value: object) -> Raw:
    return Raw(_json.encode(value))
