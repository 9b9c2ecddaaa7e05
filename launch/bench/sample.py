"""One request as the client saw it, and what makes it a good one."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """As the endpoint counts tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class Slo(msgspec.Struct, frozen=True):
    """What a good request keeps to, and how many requests must be good, as a share."""

    ttft_ms: float
    itl_ms: float
    share: float


@dataclass(slots=True)
class Sample:
    """Moments are `time.perf_counter()`.

    Latencies count from `due`, not from `sent`: a client that falls behind its schedule must not make the
    endpoint look faster (coordinated omission).
    """

    due: float
    sent: float
    ended: float = 0.0
    arrivals: array[float] = field(default_factory=lambda: array("d"))  # of each event that carried a token
    usage: Usage | None = None
    error: str | None = None  # its kind
    detail: str = ""  # what the endpoint or the system said of the error
    path: str | None = None  # x-baton-path
    stages: dict[str, float] = field(default_factory=dict)  # server-timing, in ms

    def fail(self, kind: str, detail: str) -> None:
        """The first error is the one that counts."""
        if self.error is None:
            self.error, self.detail = kind, detail

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def late_s(self) -> float:
        """How long after the schedule the client sent."""
        return self.sent - self.due

    @property
    def ttft_s(self) -> float:
        """To the first token. Only for a request that had one, as every good one has."""
        return self.arrivals[0] - self.due

    @property
    def end_to_end_s(self) -> float:
        return self.ended - self.due

    @property
    def output_tokens(self) -> int:
        """As the endpoint counts them; events, if it does not."""
        return self.usage.completion_tokens if self.usage else len(self.arrivals)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None if there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    def gaps_s(self) -> Iterator[float]:
        """Between events with tokens; 0 for those that came in one read."""
        return (later - earlier for earlier, later in pairwise(self.arrivals))

    def is_good(self, slo: Slo) -> bool:
        """Answered, the first token in time, and the others on average."""
        if not self.is_ok or self.ttft_s * 1e3 > slo.ttft_ms:
            return False
        tpot_s = self.tpot_s
        return tpot_s is None or tpot_s * 1e3 <= slo.itl_ms
