"""The engine works on prompts, and on runs that compute one or get its KV cache from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """This is one prompt of a request. `kv` is the request's `kv_transfer_params`."""

    request_id: str  # the engine's own, never used twice
    tokens: Sequence[int]
    sequences: int = 1  # answers wanted
    salt: str = ""
    kv: dict[str, Any] | None = None
    reads_cache: bool = True  # prompt logprobs need every token computed here
    priority: int = 0  # the lowest one is next, where the engine goes by it

    @property
    def is_for_decode(self) -> bool:
        """Another worker is to have the KV cache."""
        return bool(self.kv and self.kv.get("do_remote_decode"))

    @property
    def is_remote(self) -> bool:
        """Another worker has the KV cache."""
        return bool(self.kv and self.kv.get("do_remote_prefill"))


@dataclass(slots=True)
class Run:
    """The KV cache of a prompt is there. `digest` says what will be answered."""

    prompt: Prompt
    digest: bytes
    cached_tokens: int  # as usage tells it
    created_tokens: int
    was_received: bool  # from another worker
    block_ids: list[int] = field(default_factory=list)
    kv: dict[str, Any] | None = None  # the hand-off, after `Engine.finish`
