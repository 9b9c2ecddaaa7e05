"""Legs that the policy `prefix` has sent are kept account of here, with what their workers have to do.

The seconds that a prompt should take are those of one machine; how far a worker is off is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from orchestrator.routing.policies.base import Appraisal, Choice, End, Outcome, Policy
from orchestrator.routing.policies.prediction import Prediction
from orchestrator.routing.policies.prefix_index import Holder

# Seconds of prefill of a 70B-class model on eight H100: fixed, per token, per square of tokens. Only how they
# stand to each other matters much: how far all workers and each of them are off is learned.
FIXED_S: Final = 0.020
TOKEN_S: Final = 90e-6
TOKEN2_S: Final = 0.6e-9
BYTES_PER_TOKEN: Final = 4

# Rates: the newest leg has this weight, the first legs more; all are compared after so many legs.
NEWEST: Final = 0.1
SURE: Final = 10  # legs
COMPARED: Final = 16
LEAST_RATE: Final = 1e-4
MOST_RATE: Final = 1e4
BAND: Final = 0.1  # a worker whose rate is this near to the others' counts as they do: noise must not choose
LEAST_SAME: Final = 1.0 - BAND
MOST_SAME: Final = 1.0 + BAND

_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python

MOST_HEARD: Final = 64  # legs of other processes that are remembered of a worker


def seconds(tokens: float, cached: float) -> float:
    """Return how long a prefill takes at a rate of 1, if so many of its tokens are cached."""
    return FIXED_S + TOKEN_S * (tokens - cached) + TOKEN2_S * (tokens * tokens - cached * cached)


class Load:
    """This is a worker as the policy knows it: its legs, its speed, and what its cache should hold."""

    __slots__ = (
        "announced",
        "began",
        "behind_s",
        "epoch",
        "heard",
        "holder",
        "index",
        "legs",
        "mark",
        "name",
        "prediction",
        "price",
        "rate",
        "rates",
        "seen",
        "stamp",
    )

    def __init__(
        self, name: str, holder: Holder, prediction: Prediction, rate: float, rates: Rates | None
    ) -> None:
        """Its rate is `rate` until it shows one; `rates` learns it, None if nobody does."""
        self.name = name
        self.rates = rates
        self.holder = holder
        self.prediction = prediction
        self.announced = holder.capacity  # bytes of prompt that fit, by what it says
        self.epoch = -1
        self.legs: list[Sent] = []  # in the order in which they were sent
        self.began = 0.0  # when the first of them can have begun
        self.behind_s = 0.0  # expected of all others, at a rate of 1
        self.heard: list[float] = []  # expected seconds of the newest legs that other processes sent
        self.rate = rate  # measured by expected
        self.price = rate  # that is reckoned with
        self.seen = 0  # legs that the rate was learned from
        # Of the present choice.
        self.stamp = -1  # of the candidates that it was last among
        self.index = -1  # among those
        self.mark = -1  # the number of the search that has looked at it

    def add(self, leg: Sent, now: float) -> None:
        if self.legs:
            self.behind_s += leg.expected_s
        else:
            self.began = now
        self.legs.append(leg)

    def end(self, leg: Sent, outcome: Outcome, expected_s: float) -> None:
        """Take a leg out, and learn of it if it was answered; it should have taken `expected_s` at a rate of
        1. Nothing happens if it was sent to the worker as it was before.
        """
        legs, began, moment = self.legs, self.began, outcome.moment
        if legs and legs[0] is leg:
            del legs[0]
            self.began = moment  # the next one can have begun now
            if legs:
                self.behind_s -= legs[0].expected_s
        elif leg in legs:
            legs.remove(leg)
            self.behind_s -= leg.expected_s
        else:
            return
        if len(legs) < 2:
            self.behind_s = 0.0  # exactly
        if self.rates is not None and outcome.end is _ANSWERED and leg.others_s == 0.0:
            self.rates.learn(self, (moment - (leg.began if leg.began > began else began)) / expected_s)

    def become(self, scale: float) -> None:
        """Reckon with its rate as it stands to the `scale` of all; a small difference is none."""
        if not self.seen:
            self.rate = scale
        relative = self.rate / scale
        if relative > MOST_SAME:
            relative -= BAND
        elif relative < LEAST_SAME:
            relative += BAND
        else:
            relative = 1.0
        self.price = scale * relative

    def hear(self, expected_s: float) -> None:
        """Note a leg of another process."""
        self.heard.append(expected_s)
        if len(self.heard) > 2 * MOST_HEARD:
            self.heard = self.heard[-MOST_HEARD:]

    def others_s(self, count: int, mean_s: float) -> float:
        """Return the expected seconds, at a rate of 1, of so many legs of other processes: these are the last
        ones that were heard of, and what was not heard of has the mean.
        """
        known = min(count, len(self.heard))
        total_s = (count - known) * mean_s
        if known:
            total_s += sum(self.heard[-known:])
        if not self.legs:  # then one of them is under way; half of it, for all that is known
            total_s -= 0.5 * (self.heard[-known] if known else mean_s)
        return total_s

    def wait(self, now: float) -> float:
        """Return the seconds of the legs under way that are left. A leg that takes longer than it should
        does not hide those behind it.
        """
        if not self.legs:
            return 0.0
        behind_s = self.behind_s * self.price
        left_s = self.began + self.legs[0].expected_s * self.price - now
        return behind_s + left_s if left_s > 0.0 else behind_s


class Rates:
    """Rates are those of all workers that a policy knows."""

    __slots__ = ("_ends", "_left", "_loads", "lowest", "scale")

    def __init__(self, loads: Mapping[str, Load]) -> None:
        """`loads` are the workers, whoever comes or goes."""
        self._loads = loads
        self._ends = 0
        self._left = 1  # legs until all are compared
        self.scale = 1.0  # the median rate
        self.lowest = 1.0  # no worker is reckoned with at less

    def learn(self, load: Load, ratio: float) -> None:
        """Note how long a leg took, by what was expected at a rate of 1."""
        if not LEAST_RATE < ratio < MOST_RATE:
            ratio = min(max(ratio, LEAST_RATE), MOST_RATE)
        load.seen = seen = load.seen + 1
        load.rate += (ratio - load.rate) * (NEWEST if seen > SURE else 1.0 / seen)
        if len(self._loads) == 1:  # it is all of them
            self.scale = self.lowest = load.price = load.rate
            return
        self._left -= 1
        if self._left <= 0:
            self._compare()
            return
        scale = self.scale
        if load.price != scale or not LEAST_SAME * scale <= load.rate <= MOST_SAME * scale:
            load.become(scale)
            if load.price < self.lowest:
                self.lowest = load.price

    def _compare(self) -> None:
        """Find the median rate, and what is reckoned with for each worker."""
        self._ends += 1
        self._left = 1 if self._ends < COMPARED else max(COMPARED, len(self._loads))
        rates = sorted([load.rate for load in self._loads.values() if load.seen])
        self.scale = self.lowest = scale = rates[len(rates) // 2]
        for load in self._loads.values():
            load.become(scale)
            if load.price < self.lowest:
                self.lowest = load.price


class Sent(Choice[Any]):
    """A choice remembers until its leg has ended what that was expected to take."""

    __slots__ = ("began", "expected_s", "load", "others_s", "queued", "tokens", "wait_s")

    def __init__(
        self,
        worker: Any,
        policy: Policy,
        load: Load,
        now: float,
        tokens: float,
        queued: float,
        expected_s: float,
    ) -> None:
        """The prompt has so many `tokens`; `expected_s` is what it takes at a rate of 1. `queued` is the mean
        number of legs per worker.
        """
        self.worker = worker
        self.policy = policy
        self.load = load
        self.began = now
        self.tokens = tokens
        self.queued = queued
        self.expected_s = expected_s
        self.wait_s = 0.0
        self.others_s = 0.0  # of this, expected of legs of other processes, at a rate of 1

    def prompt_tokens(self) -> float:
        return self.tokens

    def own_s(self) -> float:
        return self.expected_s * self.load.price


class ShortChoice(Sent):
    """It is the worker that a prompt waits for the least, as it is too short for a step of the index."""

    __slots__ = ()

    def ended(self, outcome: Outcome) -> None:
        if self.policy is not None:
            self.policy = None
            self.load.end(self, outcome, self.expected_s)  # that is all that its policy would do

    def terms(self) -> dict[str, float]:
        own_s = (1.0 + self.queued) * self.load.price * self.expected_s
        return {
            "cost_s": self.wait_s + own_s,
            "wait_s": self.wait_s,
            "own_s": own_s,
            "evict_s": 0.0,
            "tokens": self.tokens,
            "cached_tokens": 0.0,
            "rate": self.load.price,
        }

    def __str__(self) -> str:
        return (
            f"It costs the least: {self.wait_s:.3f} s for legs under way. The prompt is too short to be "
            "looked for in caches."
        )


class Prices(Appraisal):
    """Beside each cost it has how many tokens of the prompt should be in the worker's cache."""

    def __init__(self, tokens: float) -> None:
        super().__init__(tokens)
        self.cached: list[float] = []

    def add(self, index: int, cost: float, cached: float) -> None:
        self.indexes.append(index)
        self.costs.append(cost)
        self.cached.append(cached)


class PrefixChoice(Sent):
    """It is the cheapest worker for one prompt of those that were looked at."""

    __slots__ = (
        "cost",
        "delayed",
        "draws",
        "evict_s",
        "expects",
        "hashes",
        "matched",
        "per_byte",
        "prices",
        "salt",
        "ties",
        "why",
    )

    def __init__(
        self,
        worker: Any,
        policy: Policy,
        load: Load,
        now: float,
        tokens: float,
        queued: float,
        per_byte: float,
        salt: bytes,
    ) -> None:
        """Tokens are so many `per_byte`; `salt` is for a policy that tells prompts with equal ones apart."""
        super().__init__(worker, policy, load, now, tokens, queued, 0.0)
        self.delayed = 1.0 + queued  # so often each second of work counts: for itself, and those behind it
        self.per_byte = per_byte
        self.salt = salt
        self.hashes = b""  # of the prompt's steps
        self.cost = math.inf
        self.evict_s = 0.0
        self.expects = 0.0  # tokens of the prompt that should be in the worker's cache
        self.matched = 0.0  # tokens of these that are reckoned with
        self.ties = 1
        self.draws = True  # equals are drawn; else the first one stays
        self.prices: Prices | None = None  # what all workers cost goes there, and none is kept
        self.why: object | None = None  # instead of our own reason

    def prefill_s(self) -> float:
        """Return the seconds that the prompt takes there, without what is before it."""
        return seconds(self.tokens, self.matched) * self.load.price

    def terms(self) -> dict[str, float]:
        return {
            "cost_s": self.cost,
            "wait_s": self.wait_s,
            "own_s": self.cost - self.wait_s - self.evict_s,
            "evict_s": self.evict_s,
            "tokens": self.tokens,
            "cached_tokens": self.matched,
            "rate": self.load.price,
        }

    def __str__(self) -> str:
        if self.why is not None:
            return str(self.why)
        own_s = self.cost - self.wait_s - self.evict_s
        return (
            f"It costs the least, {self.cost:.3f} s: {self.wait_s:.3f} for legs under way, {own_s:.3f} for "
            f"{self.tokens - self.matched:.0f} of {self.tokens:.0f} tokens that are new there, "
            f"{self.evict_s:.3f} for what they evict.{self._distrusted()}"
        )

    def _distrusted(self) -> str:
        if self.load.prediction.is_trusted:
            return ""
        return " What should be in its cache does not count, as too much of it was not there of late."
