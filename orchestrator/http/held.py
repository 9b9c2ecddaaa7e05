"""What requests hold in memory is counted while it comes in, and bounded.

Small requests come in one read and are never counted on their way. What takes several reads, a head, a body,
or requests that wait behind another, is counted with each of them. Above the bound those that came last give
way: they are answered 503, and what came of them is dropped, until the rest is below the bound again.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from orchestrator.compiled import mypyc_attr
from orchestrator.errors import BatonError, Overloaded

UNBOUNDED: Final = sys.maxsize


@mypyc_attr(allow_interpreted_subclasses=True)
class Holder(ABC):
    """A holder has bytes that are still coming in."""

    @abstractmethod
    def give_way(self, error: BatonError) -> None:
        """Drop what has come in and end its request with `error`; `HeldBytes.forget` follows from that."""
        ...


def _nothing() -> int:
    return 0


class HeldBytes:
    """It counts the bytes that the requests of a process hold, against the most that they may.

    Bodies that are read and waiting heads, bodies and requests are counted exactly; answers that have not
    gone out are what the last sweep over open requests has seen: counting each piece would cost more.
    """

    def __init__(self, most: int = UNBOUNDED, on_full: Callable[[], None] | None = None) -> None:
        """`on_full` is told of each request that is refused or ended because of the bound."""
        self.most = most
        self.incoming = 0  # bytes of heads, bodies and waiting requests, as they come in
        self.bodies = 0  # bytes of bodies that were read, of open requests
        self.answers = 0  # bytes of answers, at the last sweep
        # Returns the bytes of answers that wait for slow clients; servers set it.
        self.unsent: Callable[[], int] = _nothing
        self._on_full = on_full
        self._holders: dict[Holder, None] = {}  # in the order in which they began to hold something

    @property
    def size(self) -> int:
        return self.incoming + self.bodies + self.answers

    def check(self) -> None:
        """Raise `Overloaded` if there is too much already."""
        if self.incoming + self.bodies + self.answers > self.most:
            raise self.refusal()

    def refusal(self) -> Overloaded:
        """Return the error of a request for which there is no room, which is counted."""
        if self._on_full is not None:
            self._on_full()
        return Overloaded("this server holds as many bytes of requests as it may")

    def note(self, holder: Holder, more: int) -> None:
        """Count `more` bytes of a holder, and have the newest give way if that is too much."""
        self.incoming += more
        self._holders[holder] = None
        while self.incoming + self.bodies + self.answers > self.most and self._holders:
            newest = next(reversed(self._holders))
            del self._holders[newest]
            newest.give_way(self.refusal())

    def forget(self, holder: Holder, size: int) -> None:
        """Note that a holder of `size` bytes has nothing any more that is still coming in."""
        self.incoming -= size
        self._holders.pop(holder, None)
