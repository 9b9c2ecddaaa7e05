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

from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from orchestrator.wire.codec import Codec, Parts
from orchestrator.wire.handoff import Handoff
from orchestrator.wire.view import RequestView

# A worker connects to whatever host these name, so they are never taken from a client.
_NEVER_RELAYED = frozenset({"kv_transfer_params", "ec_transfer_params"})

# Fields in which the legs differ; all others are common to them.
_OWN = _NEVER_RELAYED | {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    "ignore_eos",
}

_KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class LegBodies:
    """All bodies of one request. The common part is encoded once per encoding, on first use."""

    __slots__ = ("_common", "_encoded", "_own", "_view")

    def __init__(self, view: RequestView) -> None:
        self._view = view
        self._own: dict[str, Raw] = {}
        self._common: dict[str, Raw] = {}
        for key, raw in view.fields.items():
            (self._own if key in _OWN else self._common)[key] = raw
        self._encoded: dict[str, bytes] = {}

    @property
    def asks_hidden_usage(self) -> bool:
        """The decode leg asks for a usage event that the client did not ask for."""
        return self._view.is_stream and not self._view.wants_usage

    def prefill(self, codec: Codec, model: str) -> Parts:
        """Raises `NotEncodable`, as the others do. `model` is the worker's own name of the model."""
        return self._leg(codec, self._one_token(model, _KEEP_KV))

    def decode(self, codec: Codec, model: str, handoff: Handoff) -> Parts:
        overlay = self._client_fields(model)
        overlay["kv_transfer_params"] = handoff.params
        if self.asks_hidden_usage:
            # continuous_usage_stats has no effect without include_usage, so it must not gain one here.
            overlay["stream_options"] = {"include_usage": True}
        return self._leg(codec, overlay)

    def release(self, codec: Codec, model: str, handoff: Handoff) -> Parts:
        return self._leg(codec, self._one_token(model, handoff.params))

    def whole(self, codec: Codec, model: str) -> Parts:
        return self._leg(codec, self._client_fields(model))

    def _one_token(self, model: str, kv_transfer_params: Mapping[str, Any]) -> dict[str, Any]:
        overlay = {
            "model": model,
            "stream": False,
            "max_tokens": 1,
            "ignore_eos": True,
            "kv_transfer_params": kv_transfer_params,
        }
        if "max_completion_tokens" in self._own:
            overlay["max_completion_tokens"] = 1
        return overlay

    def _client_fields(self, model: str) -> dict[str, Any]:
        overlay: dict[str, Any] = {key: raw for key, raw in self._own.items() if key not in _NEVER_RELAYED}
        if model != self._view.model:
            overlay["model"] = model
        return overlay

    def _leg(self, codec: Codec, overlay: Mapping[str, Any]) -> Parts:
        common = self._encoded.get(codec.name)
        if common is None:
            common = self._encoded[codec.name] = codec.encode_common(self._common)
        return codec.leg(common, overlay)
