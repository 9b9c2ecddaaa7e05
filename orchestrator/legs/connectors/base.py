"""A KV connector says how the KV cache of a prompt gets from its prefill worker to its decode worker.

A new connector is one file beside this one and one entry in `CONNECTORS`. The bytes of the cache go from
engine to engine; what a connector says here is what the legs tell the engines of it. All of it is pure: a
connector keeps no state and does no I/O, so one object serves all requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.compiled import mypyc_attr
from orchestrator.wire.shapes import NULL, PrefillUsage

_CACHE_COUNT: Final = b"cache_"  # is in the name of each count of created tokens, and hardly in another
_USAGE: Final = msgspec.json.Decoder(PrefillUsage)


class InvalidHandoff(ValueError):
    """The prefill worker answered without a usable hand-off; a decode leg must not be sent."""


class TokenIds:
    """These are the prompt's token ids as the prefill worker gave them; nobody here looks into them."""

    __slots__ = ("json", "packed")

    def __init__(self, json: bytes = b"", packed: bytes = b"") -> None:
        """`json` is a list, or a base64 string of little-endian int32; it is b"" if the ids are `packed`: the
        same int32 as they are.
        """
        self.json = json
        self.packed = packed

    @property
    def is_list(self) -> bool:
        return self.json.startswith(b"[")


class Handoff:
    """A hand-off names the KV blocks that a prefill worker keeps, or will make, for a decode leg: good for
    one use.
    """

    __slots__ = ("params", "prefill_cached_tokens", "token_ids", "usage")

    def __init__(
        self,
        params: bytes,
        prefill_cached_tokens: int | None = None,
        token_ids: TokenIds | None = None,
        usage: Raw = NULL,
    ) -> None:
        """`params` are the decode leg's `kv_transfer_params`, a JSON object that is not empty.

        `prefill_cached_tokens`: what the client's usage must say was found in the prefix cache; None if
        nobody knows. `usage` is that of the prefill worker's answer, as JSON, decoded when it is asked for.
        """
        self.params = params
        self.prefill_cached_tokens = prefill_cached_tokens
        self.token_ids = token_ids
        self.usage = usage

    def created_tokens(self) -> int | None:
        """Return how many tokens the prefill worker has added to its prefix cache, if it said so."""
        if bytes(self.usage).find(_CACHE_COUNT) < 0:  # `in` makes an error first, of which it makes nothing
            return None
        usage = self._decoded()
        return None if usage is None else usage.created_tokens()

    def prompt_tokens(self) -> int | None:
        """Return how many tokens the prefill worker counted in the prompt, if it said so."""
        usage = self._decoded()
        if usage is None or usage.prompt_tokens is not None:
            return None if usage is None else usage.prompt_tokens
        return usage.all_prompt_tokens()

    def _decoded(self) -> PrefillUsage | None:
        try:
            usage: PrefillUsage | None = _USAGE.decode(self.usage)
        except msgspec.DecodeError:  # null, or nothing that we know
            return None
        return usage


@mypyc_attr(allow_interpreted_subclasses=True)
class Connector(ABC):
    """A connector is one way of handing a KV cache over. Both legs carry `kv_transfer_params`, where engines
    look for it.
    """

    def __init__(self, name: str, *, sends_both_at_once: bool) -> None:
        """`name` is what the config calls it.

        `sends_both_at_once` is False if the decode leg is sent once the prefill worker has answered, with
        what that answer says (`read`). Until somebody pulls the blocks, or their lease ends, they stay
        pinned; a release leg has them freed.

        It is True if both legs are sent at the same time, as `pair` tells them. The prefill worker answers
        when the cache has gone over: one that has answered owes nothing, and to end its leg frees its blocks.
        """
        self.name = name
        self.sends_both_at_once = sends_both_at_once

    @abstractmethod
    def prefill_params(self, transfer: str) -> bytes:
        """Return the prefill leg's `kv_transfer_params`, a JSON object.

        `transfer` is a name that no other prefill leg of this orchestrator has.
        """
        ...

    @abstractmethod
    def read(self, answer: bytes, *, is_packed: bool, has_ids: bool) -> Handoff:
        """Read what a prefill worker's answer tells the decode leg. It is not called if `sends_both_at_once`.

        `is_packed`: the answer is msgpack, not JSON. `has_ids`: it was asked for the prompt's token ids.
        Raises `InvalidHandoff`.
        """
        ...

    @abstractmethod
    def pair(self, transfer: str, host: str, port: int | None) -> Handoff:
        """Return what the decode leg is told before prefill has begun. It is only called if
        `sends_both_at_once`.

        `transfer` is what the prefill leg was told; `host` and `port` are the prefill worker's, where its
        engine listens for other engines. Raises `InvalidHandoff` if that is not known and would have to be.
        """
        ...
