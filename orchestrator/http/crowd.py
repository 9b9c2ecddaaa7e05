"""The crowd is who has a connection to a server: it says who has to leave when there is no room for another.

A connection over the limit takes the place of one that has never sent a whole request, the oldest of them, or
else of one that waits between two requests. Only if all others are in use is it turned away: one request of
its is answered, with what a probe asks for, or 503, and it is closed. So clients that connect and say nothing
harm each other, not those that are known.
"""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Iterator
from typing import Final

from orchestrator.http.carrier import Carrier

UNLIMITED: Final = sys.maxsize
# Of the limit: so many that are turned away have time to ask, and to read why. For more the first are cut.
PARTING_SHARE: Final = 16
LEAST_PARTING: Final = 8
# A crowd in which nobody rests is not looked through for each who knocks.
PATIENCE_S: Final = 0.05
TOLD_EVERY_S: Final = 60.0

logger: Final = logging.getLogger("baton.server")


class Guest(Carrier):
    """A crowd sees a connection as this."""

    @property
    @abstractmethod
    def is_resting(self) -> bool:
        """Return whether nobody waits for an answer on it, and all of the last one is sent."""
        ...

    @abstractmethod
    def unsent(self) -> int:
        """Return the bytes of answers that the kernel has not taken yet."""
        ...

    @abstractmethod
    def give_way(self) -> None:
        """Close at once, for another connection."""
        ...


class Crowd:
    """A crowd has the connections of one server, and the most that there may be."""

    def __init__(self, most: int = UNLIMITED) -> None:
        self.most = most
        self.open: dict[Guest, None] = {}  # in the order of arrival
        self.silent: dict[Guest, None] = {}  # of these, who has not sent a whole request yet
        self.parting: dict[Guest, None] = {}  # who was turned away, and is told so; in the order of arrival
        self._resting: Iterator[Guest] = iter(())
        self._looked = -PATIENCE_S
        self._told = -TOLD_EVERY_S

    def enter(self, guest: Guest, now: float) -> bool:
        """Take a connection in, and return True, or return False if there is no room for it.

        Then it is to be told so, when it has asked for something; others may not have time to hear it.
        """
        if len(self.open) >= self.most and not self._make_room(now):
            self._part(guest)
            self._tell(now)
            return False
        self.open[guest] = self.silent[guest] = None
        return True

    def _part(self, guest: Guest) -> None:
        if len(self.parting) >= max(LEAST_PARTING, self.most // PARTING_SHARE):
            first = next(iter(self.parting))
            self.leave(first)
            first.give_way()
        self.parting[guest] = None

    def leave(self, guest: Guest) -> None:
        """Forget a connection. This can be repeated."""
        self.open.pop(guest, None)
        self.silent.pop(guest, None)
        self.parting.pop(guest, None)

    def _make_room(self, now: float) -> bool:
        guest = next(iter(self.silent), None) or self._next_resting(now)
        if guest is None:
            return False
        self.leave(guest)
        guest.give_way()
        return True

    def _next_resting(self, now: float) -> Guest | None:
        guest = self._still_resting()
        if guest is None and now - self._looked >= PATIENCE_S:
            self._looked = now
            self._resting = iter([guest for guest in self.open if guest.is_resting])
            guest = self._still_resting()
        return guest

    def _still_resting(self) -> Guest | None:
        for guest in self._resting:
            if guest in self.open and guest.is_resting:
                return guest
        return None

    def _tell(self, now: float) -> None:
        if now - self._told >= TOLD_EVERY_S:
            self._told = now
            logger.warning("all %d connections that clients may have are in use: others get 503", self.most)
