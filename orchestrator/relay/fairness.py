"""Those that wait at a gate stand in lines, one for each API key, and seats go round among the lines.

This is start-time fair queueing. A line has a virtual time, at which its next one starts; the line with the
lowest goes first, and when one of it gets a seat, its time moves on by the seconds for which that is expected
to hold the seat, divided by the weight of the key. Virtual time as a whole is where the last one has started:
a line that comes back starts from there, so nobody saves up for a flood, and a key that asks for less than
its share is served as if it were alone.

How long a seat was really held is known at the end, and set right then. Who has held seats for much longer
than expected falls behind the others, but only so far that it has its turn before those that wait give up; no
seat stays empty for that. Within a line those are next who would be without the others (`relay/turns.py`).
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


class Line:
    """All of one key that wait at a gate."""

    __slots__ = ("expected_s", "place", "size", "start", "tenant", "tokens", "turns", "waiting")

    def __init__(self, tenant: Tenant | None, start: float) -> None:
        """`start` is a virtual time. `tenant` is None for requests without a key."""
        self.tenant = tenant
        self.start = start
        self.waiting: OrderedDict[Waiter, None] = OrderedDict()  # in the order of arrival
        self.turns: Turns[Waiter] = Turns()  # the same, by their turns
        self.expected_s = 0.0  # how long all of them should hold their seats together
        self.tokens = 0
        self.size = 0
        self.place: Place | None = None  # if somebody waits

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
            self.expected_s = 0.0  # without what is left over of fractions

    def _count(self, waiter: Waiter, sign: int) -> None:
        self.tokens += sign * waiter.demand.tokens
        self.size += sign * waiter.demand.size
        self.expected_s += sign * waiter.own_s

    def step(self) -> float:
        """Return by how much the mean one of those that wait moves the line on."""
        return self.expected_s / len(self.waiting) / self.weight if self.waiting else 0.0

    def begun_by(self, time: float) -> int:
        """Count who of them should have started at a virtual time."""
        count = len(self.waiting)
        if not count or time < self.start:
            return 0
        step, behind = self.step(), time - self.start
        return count if step * count <= behind else min(count, 1 + int(behind / step))


class Place(Turn):
    """Here a line stands among the lines."""

    __slots__ = ("line",)

    def __init__(self, line: Line) -> None:
        super().__init__(line.start)
        self.line = line


class Lines:
    """All lines of a gate."""

    __slots__ = ("_lines", "_places", "_time")

    def __init__(self) -> None:
        self._lines: dict[Tenant | None, Line] = {}
        self._places: Turns[Place] = Turns()
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
        self._lines.clear()

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
        self._move(line, line.start + waiter.own_s / line.weight)
        return Charge(line.tenant, waiter.own_s)

    def settle(self, charge: Charge, held_s: float, most_s: float) -> None:
        """Set a charge right: the seat was held for so long. `most_s` is how far a line may fall behind."""
        line = self._lines.get(charge.tenant)
        if line is not None:
            start = line.start + (held_s - charge.seconds) / line.weight
            latest = max(line.start, self._time + most_s)
            self._move(line, max(self._time, min(start, latest)))

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
            start = max(start, line.start) + ahead * line.step()
        others = [other.begun_by(start) for other in self._lines.values() if other is not line]
        return ahead + sum(others)

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
