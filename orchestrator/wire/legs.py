"""The bodies of a request's legs (DESIGN: the two legs with vLLM's NIXL connector, pull).

prefill: fills the KV cache and keeps it pinned. One token, not streamed, and no field that could stop it
    early or forbid a single token.
decode: pulls the KV cache and answers. The client's document with the hand-off added; usage is asked for,
    because it is the evidence of transfer.
release: pulls the KV cache so that the prefill worker can free it; its answer is dropped. The prefill leg's
    document with the hand-off, so it has no field that the prefill worker has not accepted.
whole: everything on one worker. The client's document without hand-off fields.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from msgspec import Raw

from orchestrator.wire.codec import Codec, Parts
from orchestrator.wire.handoff import Handoff
from orchestrator.wire.view import RequestView

# A worker connects to whatever host these name, so they are never taken from a client.
_NEVER_RELAYED = frozenset({"kv_transfer_params", "ec_transfer_params"})

_KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

_json = msgspec.json.Encoder()


class LegBodies:
    """All bodies of one request. The common part is encoded once per encoding, on first use."""

    __slots__ = ("_codec", "_common", "_view", "asks_hidden_usage")

    def __init__(self, view: RequestView) -> None:
        self._view = view
        self._codec: Codec | None = None  # that `_common` is encoded with
        self._common = b""
        # The decode leg asks for a usage event that the client did not ask for.
        self.asks_hidden_usage = view.is_stream and not view.wants_usage

    def prefill(self, codec: Codec, model: str) -> Parts:
        """Raises `NotEncodable`, as the others do. `model` is the worker's own name of the model."""
        return self._leg(codec, _keep_kv(model, "max_completion_tokens" in self._view.own))

    def decode(self, codec: Codec, model: str, handoff: Handoff) -> Parts:
        view = self._view
        if self.asks_hidden_usage or model != view.model or not _NEVER_RELAYED.isdisjoint(view.own):
            return self._leg(codec, self._changed(model, handoff))
        return self._leg(codec, b'%b,"kv_transfer_params":%b}' % (view.own_json[:-1], handoff.params))

    def _changed(self, model: str, handoff: Handoff) -> bytes:
        overlay = self._client_fields(model)
        overlay["kv_transfer_params"] = Raw(handoff.params)
        if self.asks_hidden_usage:
            # continuous_usage_stats has no effect without include_usage, so it must not gain one here.
            overlay["stream_options"] = {"include_usage": True}
        return _json.encode(overlay)

    def release(self, codec: Codec, model: str, handoff: Handoff) -> Parts:
        overlay = _one_token(model, "max_completion_tokens" in self._view.own)
        overlay["kv_transfer_params"] = Raw(handoff.params)
        return self._leg(codec, _json.encode(overlay))

    def whole(self, codec: Codec, model: str) -> Parts:
        return self._leg(codec, _json.encode(self._client_fields(model)))

    def _client_fields(self, model: str) -> dict[str, Any]:
        overlay: dict[str, Any] = {**self._view.own}
        for name in _NEVER_RELAYED:
            overlay.pop(name, None)
        if model != self._view.model:
            overlay["model"] = model
        return overlay

    def _leg(self, codec: Codec, overlay: bytes) -> Parts:
        if self._codec is not codec:
            self._common = codec.common(self._view.common)
            self._codec = codec
        return codec.leg(self._common, overlay)


@functools.lru_cache(maxsize=256)  # one for each of the few models and both kinds of limit
def _keep_kv(model: str, has_completion_limit: bool) -> bytes:
    """The overlay of a prefill leg, which no request changes."""
    return _json.encode(_one_token(model, has_completion_limit) | {"kv_transfer_params": _KEEP_KV})


def _one_token(model: str, has_completion_limit: bool) -> dict[str, Any]:
    overlay = {"model": model, "stream": False, "max_tokens": 1, "ignore_eos": True}
    if has_completion_limit:
        overlay["max_completion_tokens"] = 1
    return overlay
