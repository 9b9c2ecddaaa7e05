"""Loads that are made, seeded: one that stays as it is, and ones that become another one half way."""

from __future__ import annotations

import math
from random import Random
from typing import Final

from launch.simulate.trace import Arrival, Trace

BLOCK_TOKENS: Final = 512
OUTPUT_TOKENS: Final = 200  # on average
SPREAD: Final = 1.2  # of the lengths of prompts: standard deviation by mean


class Load:
    """Requests come at random at a rate; half way the rate and the length of prompts are multiplied."""

    __slots__ = ("longer", "more", "prompt_tokens", "rate", "seconds")

    def __init__(
        self,
        *,
        rate: float = 3.0,
        prompt_tokens: int = 4000,
        more: float = 1.0,
        longer: float = 1.0,
        seconds: float = 5400.0,
    ) -> None:
        self.rate = rate
        self.prompt_tokens = prompt_tokens
        self.more = more
        self.longer = longer
        self.seconds = seconds

    def trace(self, seed: int) -> Trace:
        random = Random(f"load {seed}")  # no secret
        arrivals: list[Arrival] = []
        at_s = 0.0
        while at_s < self.seconds:
            is_later = at_s >= self.seconds / 2
            at_s += random.expovariate(self.rate * (self.more if is_later else 1.0))
            prompt = _length(random, self.prompt_tokens * (self.longer if is_later else 1.0), SPREAD)
            arrivals.append(Arrival(len(arrivals), at_s, prompt, _length(random, OUTPUT_TOKENS, 1.0)))
        return Trace(arrivals, BLOCK_TOKENS)


def _length(random: Random, mean: float, spread: float) -> int:
    """Return a length of the lognormal distribution."""
    variance = math.log(1 + spread * spread)
    return max(4, round(random.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))))


LOADS: Final = {
    "constant": Load(),
    "prompts x4": Load(prompt_tokens=2000, longer=4.0),
    "prompts x1/4": Load(prompt_tokens=8000, longer=0.25),
    "rate x4": Load(rate=1.5, more=4.0),
}
