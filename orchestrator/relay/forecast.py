"""How long requests will wait and take is estimated from those that have ended lately."""

from __future__ import annotations

from orchestrator.relay.waiting import Demand
from orchestrator.telemetry.record import RequestRecord


class Estimate:
    """It estimates mean and mean deviation of what was seen lately, as TCP does of round trips (RFC 6298).

    Its gains are half of TCP's: answers differ from one another more than round trips do.
    """

    __slots__ = ("deviation", "mean")

    def __init__(self) -> None:
        self.mean = 0.0
        self.deviation = 0.0

    def note(self, value: float) -> None:
        if not self.mean:
            self.mean, self.deviation = value, value / 2
            return
        error = value - self.mean
        self.mean += error / 16
        self.deviation += (abs(error) - self.deviation) / 8

    @property
    def likely(self) -> float:
        """Most values are below this."""
        return self.mean + self.deviation

    @property
    def most(self) -> float:
        """Few values are above this."""
        return self.mean + 4 * self.deviation


class Forecast:
    """It knows how long requests have held their seats lately, and how long their first bytes took."""

    __slots__ = ("_first_byte_s", "held_s")

    def __init__(self) -> None:
        self.held_s = Estimate()
        self._first_byte_s = (Estimate(), Estimate())  # since the permit; whole answers, streams

    def learn(self, record: RequestRecord, now: float) -> None:
        """Learn from a request that has ended; one without an answer tells at least that it takes longer than
        it had.
        """
        self.held_s.note(now - record.admitted)
        estimate = self._first_byte_s[record.is_stream]
        took_s = (record.first_byte or now) - record.admitted
        if record.first_byte or took_s > estimate.mean:
            estimate.note(took_s)

    def wait_s(self, ahead: int, seats: int) -> float:
        """Estimate how long one would wait behind so many: seats get free at the rate at which they did."""
        return (ahead + 1) * self.held_s.mean / seats if seats else 0.0

    def is_in_time(self, demand: Demand, begins: float) -> bool:
        """Tell whether it will be answered in time, nearly for certain, if it begins at this moment."""
        return begins + self._first_byte_s[demand.is_stream].most <= demand.deadline

    def may_begin(self, demand: Demand, now: float) -> bool:
        """Tell whether it will rather be answered in time than not, now that it is its turn."""
        return now + self._first_byte_s[demand.is_stream].likely <= demand.deadline
