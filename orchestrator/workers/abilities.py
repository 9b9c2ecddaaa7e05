"""A worker's legs are written as it announces and shows that it can take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from orchestrator.wire.codec import CODECS, JSON, Codec
from orchestrator.wire.info import TokenIdsForm, WorkerInfo

# Token ids by transport, the best first: packed ones cost a fifth of a list to read, and bin needs no base64.
_ID_FORMS: Final[Mapping[str, tuple[TokenIdsForm, ...]]] = {
    "json": ("list",),
    "orjson": ("base64", "list"),
    "msgpack": ("bin", "base64", "list"),
}
_NO_EPOCH: Final = -1  # comes before all


class Abilities:
    """The abilities of a worker say in which form it gets its legs, and in which epoch it has shown what.

    Legs note what they see of it here.
    """

    __slots__ = ("_transport", "codec", "distrusted_epoch", "proven_epoch", "token_ids", "unendable_epoch")

    def __init__(self, transport: str) -> None:
        """`transport` is what the worker may be sent: json, orjson or msgpack."""
        self._transport = transport
        self.codec: Codec = JSON
        self.token_ids: tuple[TokenIdsForm, ...] = ()  # forms that it gives and takes, the best first
        self.unendable_epoch = _NO_EPOCH  # in which it did not know how to end a request
        self.proven_epoch = _NO_EPOCH  # in which it took a leg in the form that it announced
        self.distrusted_epoch = _NO_EPOCH  # in which it refused one

    def announce(self, info: WorkerInfo | None, epoch: int) -> None:
        """Go by what the worker announces in this epoch, if it has not refused that. One without our plugin
        says None and gets plain JSON.
        """
        if self.distrusted_epoch == epoch:
            info = None
        is_understood = info is not None and self._transport in info.decodes
        self.codec = CODECS[self._transport] if is_understood else JSON
        forms = info.token_ids if info is not None else ()
        self.token_ids = tuple(form for form in _ID_FORMS[self._transport] if form in forms)

    def can_end(self, epoch: int) -> bool:
        """Tell whether the worker may know how to end a request: it has not failed to in this epoch."""
        return self.unendable_epoch != epoch
