"""A tally counts what a simulated site has served, as the orchestrator's telemetry does."""

from __future__ import annotations

from array import array
from typing import Protocol

from launch.simulate.trace import Arrival
from orchestrator.telemetry.answers import LEAST_TOKENS
from orchestrator.telemetry.counters import GAP_BOUNDS, STAGE_BOUNDS, histogram_cells, observe_all


class Served(Protocol):
    """A request was served; moments are the clock's."""

    arrival: Arrival
    cached_tokens: int
    received_at: float
    first_at: float
    ended_at: float


class Tally:
    """`entered` requests got permits, `answered` were answered, with so many `new_tokens` in prompts."""

    def __init__(self) -> None:
        self.entered = 0
        self.answered = 0
        self.new_tokens = 0
        self._first_tokens = array("q", bytes(8 * histogram_cells(STAGE_BOUNDS)))
        self._gaps = array("q", bytes(8 * histogram_cells(GAP_BOUNDS)))

    def note(self, job: Served) -> None:
        """Count a request that was answered."""
        self.answered += 1
        self.new_tokens += job.arrival.prompt_tokens - job.cached_tokens
        observe_all(self._first_tokens, 0, STAGE_BOUNDS, [job.first_at - job.received_at])
        tokens = job.arrival.output_tokens
        if tokens >= LEAST_TOKENS:
            observe_all(self._gaps, 0, GAP_BOUNDS, [(job.ended_at - job.first_at) / (tokens - 1)])

    def first_tokens(self) -> list[int]:
        return list(self._first_tokens[:-1])

    def gaps(self) -> list[int]:
        return list(self._gaps[:-1])

    @property
    def gaps_s(self) -> float:
        return self._gaps[-1] / 1e6
