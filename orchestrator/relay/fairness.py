"""Those that wait at a gate stand in lines, one for each API key, and seats go round among the lines.

This is start-time fair queueing. A line has a virtual time, at which its next one starts; the line with the
lowest goes first, and when one of it gets a seat, its time moves on by the seconds for which that is expected
to hold the seat, divided by the weight of the key. Virtual time as a whole is where the last one has started:
a line that comes back starts from there, so nobody saves up for a flood, and a key that asks for less than
its share is served as if it were alone.

How long the requests of a key hold their seats for so much work is learned from those that have ended. What
one was charged is set right at its end. Who has held seats for much longer than expected falls behind the
others, but only so far that it has its turn before those that wait give up; no seat stays empty for that.
Within a line those are next who would be without the others (`relay/turns.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from orchestrator.relay.tenants import Tenant
from orchestrator.relay.turns import Turn, Turns
from orchestrator.relay.waiting import Charge, Demand, Waiter

# What a line has in the queue is measured in these.
REQUESTS: Final = 0
TOKENS: Final = 1
BYTES: Final = 2

_MOST_LINES: Final = 1024


class Pace:
    """It estimates for how long seats are held for so much work, from the means of both."""

    __slots__ = ("_held_s", "_work")

    def __init__(self) -> None:
        self._held_s = 0.0
        self._work = 0.0

    def note(self, held_s: float, work: float) -> None:
        if self._work:
            self._held_s += (held_s - self._held_s) / 16
            self._work += (work - self._work) / 16
        else:
            self._held_s, self._work = held_s, work

    def seconds(self, work: float) -> float:
        """Return the time for some work; -1 as long as nothing is known."""
        return work * self._held_s / self._work if self._work else -1.0


class Line:
    """All of one key that wait at a gate."""

    __slots__ = ("pace", "place", "size", "start", "tenant", "tokens", "turns", "waiting", "work")

    def __init__(self, tenant: Tenant | None, start: float) -> None:
        """`start` is a virtual time. `tenant` is None for requests without a key."""
        self.tenant = tenant
        self.start = start
        self.waiting: OrderedDict[Waiter, None] = OrderedDict()  # in the order of arrival
        self.turns: Turns[Waiter] = Turns()  # the same, by their turns
        self.work = 0.0  # of all of them
        self.tokens = 0
        self.size = 0
        self.place: Place | None = None  # if somebody waits
        self.pace = Pace()

    @property
    def weight(self) -> float:
        return 1.0 if self.tenant is None else self.tenant.weight

    def uses(self, unit: int) -> int:
        """Return how much of a unit is in the queue for this line."""
        if unit == REQUESTS:
            return len(self.waiting)
        return self.tokens if unit == TOKENS else self.size

    def add(self, waiter: Waiter) -> None:
        self.waiting[waiter] = None
        self.turns.add(waiter)
        self._count(waiter, 1)

    def remove(self, waiter: Waiter) -> None:
        del self.waiting[waiter]
        self._count(waiter, -1)
        if not self.waiting:
            self.work = 0.0  # without what is left over of fractions

    def _count(self, waiter: Waiter, sign: int) -> None:
        self.tokens += sign * waiter.demand.tokens
        self.size += sign * waiter.demand.size
        self.work += sign * waiter.demand.work

    def begun_by(self, time: float, step: float) -> int:
        """Count who of them should have started at a virtual time, if each moves the line on by `step`."""
        count = len(self.waiting)
        if not count or time < self.start:
            return 0
        behind = time - self.start
        return count if step * count <= behind else min(count, 1 + int(behind / step))


class Place(Turn):
    """Here a line stands among the lines."""

    __slots__ = ("line",)

    def __init__(self, line: Line) -> None:
        super().__init__(line.start)
        self.line = line


class Lines:
    """All lines of a gate."""

    __slots__ = ("_lines", "_pace", "_places", "_time")

    def __init__(self) -> None:
        self._lines: dict[Tenant | None, Line] = {}
        self._places: Turns[Place] = Turns()
        self._pace = Pace()  # of all lines
        self._time = 0.0

    def add(self, waiter: Waiter) -> None:
        """Let somebody wait in its line."""
        tenant = waiter.demand.tenant
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = Line(tenant, self._time)
        line.add(waiter)
        if len(line.waiting) == 1:
            line.start = max(line.start, self._time)
            self._stand(line)

    def remove(self, waiter: Waiter) -> None:
        """Let somebody wait no longer; it `is_over`."""
        line = self._lines[waiter.demand.tenant]
        line.remove(waiter)
        line.turns.tidy(len(line.waiting))
        if not line.waiting:
            self._stand(line)
        self._places.tidy(len(self._lines))

    def first(self) -> Waiter | None:
        """Return who is next."""
        place = self._places.first()
        return None if place is None else place.line.turns.first()

    def forget(self) -> None:
        """Begin anew, as nobody waits: everybody has had what they asked for."""
        if len(self._lines) > _MOST_LINES:  # keys come and go
            self._lines.clear()
        for line in self._lines.values():
            line.start = self._time

    def _stand(self, line: Line) -> None:
        """Have a line stand where its start says; nowhere if nobody is in it."""
        if line.place is not None:
            line.place.is_over = True
        line.place = None
        if line.waiting:
            line.place = Place(line)
            self._places.add(line.place)

    # --- what seats cost ------------------------------------------------------------------------

    def charge(self, waiter: Waiter) -> Charge:
        """Move a line on by what somebody of it takes who gets a seat now."""
        line = self._lines[waiter.demand.tenant]
        self._time = max(self._time, line.start)
        work = waiter.demand.work
        seconds = self._seconds(line, work)
        self._move(line, line.start + seconds / line.weight)
        return Charge(line.tenant, work, seconds)

    def _seconds(self, line: Line, work: float) -> float:
        """Return for how long a seat should be held for some work of a line."""
        seconds = line.pace.seconds(work)
        if seconds < 0.0:
            seconds = self._pace.seconds(work)
        return work if seconds < 0.0 else seconds

    def settle(self, charge: Charge, held_s: float, most_s: float) -> None:
        """Set a charge right: the seat was held for so long. `most_s` is how far a line may fall behind.

        What was charged too much makes a line go first until it has had that; but only while it has somebody
        to go, as it starts from where all are when it comes back.
        """
        self._pace.note(held_s, charge.work)
        line = self._lines.get(charge.tenant)
        if line is not None:
            line.pace.note(held_s, charge.work)
            start = line.start + (held_s - charge.seconds) / line.weight
            self._move(line, min(start, max(line.start, self._time + most_s)))

    def refund(self, charge: Charge) -> None:
        """Give back what was charged for a seat that was not used."""
        line = self._lines.get(charge.tenant)
        if line is not None:
            self._move(line, line.start - charge.seconds / line.weight)

    def _move(self, line: Line, start: float) -> None:
        if start != line.start:
            line.start = start
            self._stand(line)

    # --- what is to be expected -----------------------------------------------------------------

    def ahead_of(self, demand: Demand, at: float) -> int:
        """Count who should get seats before somebody who comes now; `at` is its turn in its line."""
        line = self._lines.get(demand.tenant)
        start, ahead = self._time, 0
        if line is not None:
            ahead = line.turns.ahead_of(at)
            start = max(start, line.start) + ahead * self._step(line)
        others = [
            other.begun_by(start, self._step(other)) for other in self._lines.values() if other is not line
        ]
        return ahead + sum(others)

    def _step(self, line: Line) -> float:
        """Return by how much the mean one of those that wait moves a line on."""
        count = len(line.waiting)
        return self._seconds(line, line.work / count) / line.weight if count else 0.0

    # --- who has to go --------------------------------------------------------------------------

    def losers(self, demand: Demand, over: list[int]) -> list[Waiter] | None:
        """Return who is to leave so that one more has room; `over` says by how much it is too much, of each
        unit.

        They are the newest of those lines that have the most in proportion to their weights, while that is
        more than the line of the one that comes would have. None: that one has to go.
        """
        own = self._lines.get(demand.tenant)
        room = _Room([line for line in self._lines.values() if line.waiting and line is not own])
        weight = 1.0 if demand.tenant is None else demand.tenant.weight
        wanted = [1, demand.tokens, demand.size]
        found: list[Waiter] = []
        for unit in (REQUESTS, TOKENS, BYTES):
            share = (wanted[unit] + (0 if own is None else own.uses(unit))) / weight
            while over[unit] > 0:
                loser = room.loser(unit, share)
                if loser is None:
                    return None
                found.append(loser)
                over[REQUESTS] -= 1
                over[TOKENS] -= loser.demand.tokens
                over[BYTES] -= loser.demand.size
        return found


class _Room:
    """It finds out who has to leave, one after the other, without changing the lines."""

    __slots__ = ("_left", "_newest", "_uses")

    def __init__(self, lines: list[Line]) -> None:
        self._left = lines
        self._newest = [[*line.waiting] for line in lines]
        self._uses = [[line.uses(unit) for unit in (REQUESTS, TOKENS, BYTES)] for line in lines]

    def loser(self, unit: int, share: float) -> Waiter | None:
        """Return the newest of the line with the most of a unit, if that is more than this share."""
        largest, most = -1, share
        for index, line in enumerate(self._left):
            has = self._uses[index][unit] / line.weight
            if has > most:
                largest, most = index, has
        if largest < 0:
            return None
        loser, uses = self._newest[largest].pop(), self._uses[largest]
        uses[REQUESTS] -= 1
        uses[TOKENS] -= loser.demand.tokens
        uses[BYTES] -= loser.demand.size
        return loser
