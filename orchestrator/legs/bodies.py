"""The legs of a request have these bodies; what they say of the KV cache is the connector's
(`legs/connectors/`).

prefill: fills the KV cache and keeps it for the decode leg. One token, not streamed, and no field that could
    stop it early or forbid a single token.
decode: takes the KV cache over and answers. The client's document with the hand-off added; usage is asked
    for, because it is the evidence of transfer. If the prefill worker gave the prompt's token ids, they go
    along, so that nobody tokenises twice, and the text of the prompt stays behind where nothing needs it.
release: pulls the KV cache so that the prefill worker can free it; its answer is dropped. The prefill leg's
    document with the hand-off, so it has no field that the prefill worker has not accepted; and a cache salt
    of its own. For some requests that it refuses vLLM (0.32) frees the blocks by itself: what is pulled
    then may be of another prompt already, and must be no prefix that anybody finds in the decode worker.
whole: everything on one worker. The client's document without hand-off fields.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec
from msgspec import Raw

from orchestrator.api.leg_form import OPENAI, SALT, LegForm
from orchestrator.api.view import TRANSFER_FIELDS, RequestView
from orchestrator.legs.connectors import NIXL
from orchestrator.legs.connectors.base import Connector, Handoff, TokenIds
from orchestrator.wire.codec import MAX_INLINE_BYTES, TOKEN_IDS_KEY, Codec, Parts, json_object
from orchestrator.wire.shapes import Message, MessagePart

# This stands for messages whose tokens go along: vLLM wants at least one.
_CUT_MESSAGES: Final = Raw(b'[{"role":"user","content":"-"}]')
_QUOTE: Final = ord('"')
_NULL: Final = Raw(b"null")

# Larger ones stay: a million messages of nothing would hold the event loop up.
_MAX_SCANNED_BYTES: Final = 1024 * 1024

# Fields for which vLLM goes back to the text of the prompt (0.32).
_NEED_TEXT: Final = frozenset({"suffix", "return_prompt_text", "return_token_offsets"})


_MESSAGES: Final = msgspec.json.Decoder(list[Message])
_PARTS: Final = msgspec.json.Decoder(list[MessagePart])
_json: Final = msgspec.json.Encoder()


class LegBodies:
    """It makes all bodies of one request. The common part is encoded once per encoding, on first use."""

    __slots__ = (
        "_codec",
        "_common",
        "_name",
        "_view",
        "asks_hidden_usage",
        "codec",
        "connector",
        "form",
        "path",
    )

    def __init__(
        self, view: RequestView, path: str = "", connector: Connector = NIXL, form: LegForm = OPENAI
    ) -> None:
        """`path` is where the legs are sent; `connector` says what they tell of the KV cache; `form` is the
        endpoint's.
        """
        self._view = view
        self.path = path
        self.connector = connector
        self.form = form
        self.codec = form.codec
        self._name: str | None = None  # of the leg whose body is made, if the body has it
        self._codec: Codec | None = None  # that `_common` is encoded with
        self._common: Parts = ()
        # The decode leg asks for a usage event that the client did not ask for.
        self.asks_hidden_usage = view.is_stream and not view.wants_usage

    @property
    def is_stream(self) -> bool:
        """The answer comes as it is made."""
        return self._view.is_stream

    @property
    def given(self) -> int:
        """It is how many fields the client's document has; -1 if nobody knows."""
        return self._view.given

    @property
    def takes_ids(self) -> bool:
        """The prompt is text, which somebody has to tokenise, and nothing but its tokens is needed of it."""
        shared = self._view.shared
        if not self.form.gives_ids:
            return False
        if not _NEED_TEXT.isdisjoint(shared):
            return False
        prompt = shared.get("prompt")
        return prompt is None or memoryview(prompt)[0] == _QUOTE

    def call(self, name: str) -> None:
        """Name the leg whose body is made next."""
        self._name = name

    def to_transcode(self, codec: Codec) -> bytes | None:
        """Return the common part, if this encoding of it is not to be made in place; see `adopt()`."""
        if codec.keeps_bytes or codec is self._codec or sum(map(len, self._view.common)) <= MAX_INLINE_BYTES:
            return None
        return b"".join(self._view.common)

    def adopt(self, codec: Codec, common: bytes) -> None:
        """Take the common part as it was encoded elsewhere."""
        self._codec, self._common = codec, (common,)

    def prefill(self, codec: Codec, model: str, transfer: str = "", *, asks_ids: bool = False) -> Parts:
        """Make the body of a prefill leg; `model` is the worker's own name of the model. Raises
        `NotEncodable`, as the others do.

        `transfer` names the leg among all prefill legs.
        """
        form, params = self.form, self.connector.prefill_params(transfer)
        overlay = _prefill_overlay(form, model, form.kind(self._view), asks_ids, params)
        return self._leg(codec, overlay if self._name is None else _named(overlay, self._name))

    def decode(self, codec: Codec, model: str, handoff: Handoff) -> Parts:
        if handoff.token_ids is not None:
            return self._decode_with_ids(codec, model, handoff, handoff.token_ids)
        view = self._view
        if (
            self._name is not None
            or self.asks_hidden_usage
            or model != view.model
            or not TRANSFER_FIELDS.isdisjoint(view.own)
        ):
            return self._leg(codec, _json.encode(self._changed(model, handoff.params)))
        return self._leg(codec, b'%b,"kv_transfer_params":%b}' % (view.own_json[:-1], handoff.params))

    def _decode_with_ids(self, codec: Codec, model: str, handoff: Handoff, ids: TokenIds) -> Parts:
        is_completion = "prompt" in self._view.shared
        in_params = not (ids.packed or (is_completion and ids.is_list))
        params = _with_json_ids(handoff.params, ids.json) if in_params else handoff.params
        overlay = self._changed(model, params)
        rest = dict(self._view.shared)
        if is_completion:
            del rest["prompt"]
            if ids.is_list:  # what vLLM takes as it is; packed ids become the prompt in our plugin
                overlay["prompt"] = Raw(ids.json)
        elif _can_be_cut(rest):
            rest["messages"] = _CUT_MESSAGES
        common = codec.common(json_object(rest))
        if not ids.packed:
            return codec.leg(common, _json.encode(overlay))
        del overlay["kv_transfer_params"]
        return codec.leg_with_ids(common, _json.encode(overlay), params, ids.packed)

    def _changed(self, model: str, kv_transfer_params: bytes) -> dict[str, Any]:
        overlay = self._client_fields(model)
        overlay["kv_transfer_params"] = Raw(kv_transfer_params)
        if self.asks_hidden_usage:
            # continuous_usage_stats has no effect without include_usage, so it must not gain one here.
            overlay["stream_options"] = {"include_usage": True}
        return overlay

    def release(self, codec: Codec, model: str, handoff: Handoff, salt: str) -> Parts:
        form, shared = self.form, self._view.shared
        overlay: dict[str, Any] = {"model": model, **form.one_token(form.kind(self._view))}
        encoded = _json.encode(overlay | {"kv_transfer_params": Raw(handoff.params), SALT: salt})
        if self._name is not None:
            encoded = _named(encoded, self._name)
        kept = form.released(shared)
        if kept is shared:
            return self._leg(codec, encoded)
        return codec.leg(codec.common(json_object(kept)), encoded)

    def whole(self, codec: Codec, model: str) -> Parts:
        return self._leg(codec, _json.encode(self._client_fields(model)))

    def _client_fields(self, model: str) -> dict[str, Any]:
        overlay: dict[str, Any] = {**self._view.own}
        for name in TRANSFER_FIELDS:
            overlay.pop(name, None)
        if model != self._view.model:
            overlay["model"] = model
        if self._name is not None:
            overlay["request_id"] = self._name
        return overlay

    def _leg(self, codec: Codec, overlay: bytes) -> Parts:
        if self._codec is not codec:
            self._common = codec.common(self._view.common)
            self._codec = codec
        return codec.leg(self._common, overlay)


# There is one for each of the few models and kinds of request; more where the connector's part changes.
@functools.lru_cache(maxsize=256)
def _prefill_overlay(form: LegForm, model: str, kind: str, asks_ids: bool, params: bytes) -> bytes:
    overlay = {"model": model, **form.one_token(kind), "kv_transfer_params": Raw(params)}
    return _json.encode(overlay | {"return_token_ids": True} if asks_ids else overlay)


def _named(overlay: bytes, name: str) -> bytes:
    """Add the name of a leg to its fields, of which there are some."""
    return b'%b,"request_id":"%b"}' % (overlay[:-1], name.encode())


def _with_json_ids(params: bytes, ids: bytes) -> bytes:
    """Put the token ids among the parameters of a hand-off, which are never empty."""
    return b'%b,"%b":%b}' % (params[:-1], TOKEN_IDS_KEY.encode(), ids)


def _can_be_cut(shared: dict[str, Raw]) -> bool:
    """Tell whether the token ids say all that a worker wants to know of the messages.

    They do not where there are images, audio and the like; where vLLM counts the tool calls of the past to
    name the next one; and where it takes the answer's role from the last message.
    """
    raw = shared.get("messages")
    if raw is None or len(raw) > _MAX_SCANNED_BYTES or "add_generation_prompt" in shared:
        return False
    try:
        messages = _MESSAGES.decode(raw)
        return all(bytes(message.tool_calls) == b"null" and _is_text(message.content) for message in messages)
    except msgspec.DecodeError:  # not OpenAI's shape: for the worker to judge
        return False


def _is_text(content: Raw) -> bool:
    if memoryview(content)[0] == ord("["):
        return all(part.type == "text" for part in _PARTS.decode(content))
    return memoryview(content)[0] != ord("{")
