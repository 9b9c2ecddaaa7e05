"""The cheapest worker for a request is found here, by what is known of its prompt and of the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from orchestrator.routing.policies.base import Policy, Request
from orchestrator.routing.policies.prefix_index import FINE, MOST_BYTES, Found, PrefixIndex, bytes_of, hashed
from orchestrator.routing.policies.prefix_legs import (
    BYTES_PER_TOKEN,
    FIXED_S,
    NEWEST,
    TOKEN_S,
    Load,
    PrefixChoice,
    Prices,
    Rates,
    ShortChoice,
    seconds,
)
from orchestrator.routing.policies.prefix_workers import Workers

MOST_QUEUED: Final = 4.0  # legs per worker that added work delays; more say nothing more
LOOKED_AT: Final = 64  # workers without the prompt per choice; of a larger pool these go round
MOST_FOUND: Final = 64  # workers with some of it are looked at one by one
LEAST_TOKENS: Final = FINE // BYTES_PER_TOKEN  # of a prompt with a whole step
SHORT_S: Final = [seconds(float(tokens), 0.0) for tokens in range(LEAST_TOKENS)]  # of one without, by tokens


class Levels:
    """So much of a prompt is known, run by run, and by whom."""

    __slots__ = ("holders", "spared", "spared_s", "tokens")

    def __init__(self) -> None:
        self.holders: list[int] = []  # of each run
        self.tokens: list[float] = []  # of the prompt, up to the end of each run
        self.spared: list[float] = []  # seconds, up to there, that are no cost but an investment
        self.spared_s = 0.0  # of all

    def add(self, holders: int, tokens: float, new_tokens: float, fan_out: float) -> None:
        """`new_tokens` of a run with this share of fan-out cost 1 / (1 + `fan_out`)."""
        self.spared_s += TOKEN_S * new_tokens * fan_out / (1.0 + fan_out)
        self.holders.append(holders)
        self.tokens.append(tokens)
        self.spared.append(self.spared_s)


class Asked:
    """A request was asked about its prompt."""

    __slots__ = ("candidates", "hashes", "per_byte", "salt", "tokens")

    def __init__(self, request: Request, candidates: Sequence[Any], seed: int, salt: bytes) -> None:
        """`seed` tells prompts apart that share no cache, `salt` those with equal tokens."""
        self.salt = salt
        self.candidates = candidates
        self.tokens = tokens = float(request.prompt_tokens())
        self.hashes = b""
        self.per_byte = 1 / BYTES_PER_TOKEN
        if tokens >= LEAST_TOKENS:
            prompt = request.prompt(MOST_BYTES)
            self.hashes = hashed(prompt, seed)
            if 0 < len(prompt) < MOST_BYTES:
                self.per_byte = tokens / len(prompt)


def level_of(levels: Levels, load: Load) -> int:
    """Return up to which level a worker has the prompt; -1 if it has nothing of it."""
    level = len(levels.holders) - 1
    while level >= 0 and not levels.holders[level] & load.holder.bit:
        level -= 1
    return level


class Search:
    """A search looks at the workers that may be chosen now; it changes nothing but whose turn it is."""

    __slots__ = (
        "_eviction",
        "_eviction_age_s",
        "_fan_out",
        "_index",
        "_mark",
        "_policy",
        "_random",
        "_rates",
        "_time",
        "_workers",
        "first",
        "mean_s",
        "queued",
    )

    def __init__(
        self,
        policy: Policy,
        index: PrefixIndex,
        workers: Workers,
        rates: Rates,
        random: Random,
        time: Callable[[], float],
        fan_out: float,
        eviction: float,
        eviction_age_s: float,
    ) -> None:
        """Choices are those of `policy`; the last three are its arguments."""
        self._policy = policy
        self._index = index
        self._workers = workers
        self._rates = rates
        self._random = random
        self._time = time
        self._fan_out = fan_out
        self._eviction = eviction
        self._eviction_age_s = eviction_age_s
        self._mark = 0  # the number of the search
        self.first = -1  # at which of the candidates the last one began, or ended if they are many
        self.queued = 0.0  # the mean number of legs per worker, as the last one has it
        self.mean_s = 0.0  # expected, per leg

    def found(self, asked: Asked) -> Found | None:
        return self._index.find(asked.hashes) if asked.hashes else None

    def note_expected(self, expected_s: float) -> None:
        """Note what a leg should take that is sent."""
        self.mean_s += (expected_s - self.mean_s) * (NEWEST if self.mean_s else 1.0)

    def note_turn(self, count: int) -> None:
        """Let the next search begin elsewhere."""
        first = (self.first + 1) % count
        self.first = (first + LOOKED_AT) % count if count > LOOKED_AT else first

    # --- prompts that are too short to be known -------------------------------------------------

    def _least_busy(self, candidates: Sequence[Any], own_s: float, now: float) -> Load:
        """Return the worker at which a prompt that nobody knows costs the least; equals take turns. `own_s`
        is its own part at a rate of 1.
        """
        present = self._workers.present
        count = len(present)
        first = (self.first + 1) % count
        self.note_turn(count)
        best = present[first]
        if not best.legs and best.price <= self._rates.lowest and candidates[first].in_flight == 0:
            return best  # nobody costs less
        own_s *= 1.0 + self.queued
        mean_s = self.mean_s or FIXED_S
        least = math.inf
        flights = 0
        looked_at = count if count < LOOKED_AT else LOOKED_AT
        for index in range(first - count, first - count + looked_at):  # negative ones are the last
            load = present[index]
            in_flight: int = candidates[index].in_flight
            flights += in_flight
            wait_s = load.wait(now) if load.legs else 0.0
            others = in_flight - len(load.legs)
            if others > 0:
                wait_s += load.others_s(others, mean_s) * load.price
            cost = wait_s + load.price * own_s
            if cost < least:
                best, least = load, cost
        queued = flights / looked_at
        self.queued = queued if queued < MOST_QUEUED else MOST_QUEUED
        return best

    def short(self, candidates: Sequence[Any], tokens: int) -> ShortChoice:
        """Return the choice for such a prompt; nobody is told of it yet."""
        now = self._time()
        expected_s = SHORT_S[tokens]
        load = self._workers.only or self._least_busy(candidates, expected_s, now)
        worker = candidates[load.index]
        if worker.epoch != load.epoch:
            self._workers.note_return(load, worker.epoch)
        choice = ShortChoice(worker, self._policy, load, now, tokens, self.queued, expected_s)
        others = worker.in_flight - len(load.legs)
        if others > 0:
            choice.others_s = load.others_s(others, self.mean_s or FIXED_S)
            choice.wait_s = load.wait(now) + choice.others_s * load.price
        elif load.legs:
            choice.wait_s = load.wait(now)
        return choice

    # --- all others -----------------------------------------------------------------------------

    def cheapest(self, asked: Asked, found: Found | None, prices: Prices | None) -> PrefixChoice:
        """Look at the workers, and keep the best; if `prices` is given, only note there what all cost."""
        candidates, tokens = asked.candidates, asked.tokens
        if self._workers.only is not None and prices is None:
            in_flight: int = candidates[0].in_flight
            self.queued = float(in_flight) if in_flight < MOST_QUEUED else MOST_QUEUED
            return self.look(asked, 0, found)
        self._mark += 1
        count = len(candidates)
        first = (self.first + 1) % count
        last = first + min(count, LOOKED_AT)
        if prices is None:
            self.note_turn(count)
        flights = [candidates[index - count].in_flight for index in range(first, last)]
        queued = sum(flights) / len(flights)
        self.queued = queued if queued < MOST_QUEUED else MOST_QUEUED
        present = self._workers.present
        search = self._choice(asked, first)
        search.prices = prices
        spared_s = 0.0
        levels: Levels | None = None
        if found is not None and found.steps:
            levels = self._levels(found, count, asked.per_byte)
            spared_s = levels.spared_s
            if self._search_holders(search, candidates, levels):
                levels = None
        search.draws = False
        own_s = max(seconds(tokens, 0.0) - spared_s, FIXED_S)
        # Nobody who has nothing of the prompt costs less than that; if `prices` is given, all are asked for.
        least = search.delayed * self._rates.lowest * own_s if prices is None else -1.0
        if levels is None and search.cost <= least:
            return search
        for index in range(first, last):
            load = present[index - count]
            if load.mark == self._mark:
                continue
            if levels is not None:
                self._try_holder(search, candidates, levels, load)
            else:
                self._try(search, load, flights[index - first], own_s, 0.0)
                if search.cost <= least:
                    break
        return search

    def look(self, asked: Asked, index: int, found: Found | None) -> PrefixChoice:
        """Return what a request would find at the candidate with this index."""
        look = self._choice(asked, index)
        levels = Levels()
        if found is not None and found.steps:
            levels = self._levels(found, len(asked.candidates), asked.per_byte)
        self._try_holder(look, asked.candidates, levels, look.load)
        return look

    def expected(self, choice: PrefixChoice, found: Found) -> float:
        """Return how many tokens of the prompt should be in the cache of a worker that is not trusted."""
        levels = self._levels(found, len(self._workers.present), choice.per_byte)
        level = level_of(levels, choice.load)
        return min(levels.tokens[level], max(choice.tokens - 1.0, 0.0)) if level >= 0 else 0.0

    def _choice(self, asked: Asked, index: int) -> PrefixChoice:
        """Return a choice of this candidate that any other is better than."""
        return PrefixChoice(
            asked.candidates[index],
            self._policy,
            self._workers.present[index],
            self._time(),
            asked.tokens,
            self.queued,
            asked.per_byte,
            asked.salt,
        )

    def _levels(self, found: Found, count: int, per_byte: float) -> Levels:
        levels = Levels()
        share = self._fan_out / count
        before = 0.0
        holders = -1  # of all that is before as well
        for run in found.runs:
            tokens = bytes_of(run.end) * per_byte
            holders &= run.holders
            levels.add(holders, tokens, tokens - before, share * run.fan_out)
            before = tokens
        partial = found.partial
        if partial is not None:
            tokens = bytes_of(found.steps) * per_byte
            levels.add(holders & partial.holders, tokens, tokens - before, share * partial.fan_out)
        return levels

    def _search_holders(self, search: PrefixChoice, candidates: Sequence[Any], levels: Levels) -> bool:
        """Look at those who have some of the prompt, most of it first. False if they are too many."""
        done, looked_at = 0, 0
        for level in range(len(levels.holders) - 1, -1, -1):
            left = levels.holders[level] & ~done
            done |= left
            while left:
                bit = left & -left
                left ^= bit
                load = self._workers.by_slot[bit.bit_length() - 1]
                if load.stamp != self._workers.stamp or not load.prediction.is_trusted:
                    continue  # it is no candidate, or one like those that have nothing of it
                if looked_at == MOST_FOUND:
                    return False
                looked_at += 1
                self._try_at(search, candidates, levels, level, load)
        return True

    def _try_holder(
        self, search: PrefixChoice, candidates: Sequence[Any], levels: Levels, load: Load
    ) -> None:
        """Look at one that may have some of the prompt."""
        level = level_of(levels, load) if load.prediction.is_trusted else -1
        self._try_at(search, candidates, levels, level, load)

    def _try_at(
        self, search: PrefixChoice, candidates: Sequence[Any], levels: Levels, level: int, load: Load
    ) -> None:
        """Look at one that has the prompt up to a level; -1 is nothing of it."""
        cached = spared_s = 0.0
        if level >= 0:
            cached, spared_s = levels.tokens[level], levels.spared[level]
        if cached > search.tokens - 1.0:
            cached = max(search.tokens - 1.0, 0.0)
        own_s = max(seconds(search.tokens, cached) - (levels.spared_s - spared_s), FIXED_S)
        load.mark = self._mark
        self._try(search, load, candidates[load.index].in_flight, own_s, cached)

    def _try(self, search: PrefixChoice, load: Load, in_flight: int, own_s: float, cached: float) -> None:
        """Keep this worker if it costs less; `own_s` is its own part at a rate of 1."""
        wait_s = load.wait(search.began) if load.legs else 0.0
        others = in_flight - len(load.legs)
        others_s = 0.0
        if others > 0:  # legs of other processes: how many there are is known at once
            others_s = load.others_s(others, self.mean_s)
            wait_s += others_s * load.price
        evict_s = 0.0
        new = search.tokens - cached
        holder = load.holder
        is_full = holder.size + new * BYTES_PER_TOKEN > holder.full_at
        if is_full and holder.runs and load.prediction.is_trusted and search.tokens >= LEAST_TOKENS:
            evict_s = self._evicted_s(load, new, search.began)
        cost = wait_s + search.delayed * load.price * own_s + evict_s
        if search.prices is not None:
            search.prices.add(load.index, cost, cached)
            return
        if cost > search.cost:
            return
        if cost < search.cost:
            search.ties = 1
        elif not self._wins_tie(search):
            return
        search.load = load
        search.cost = cost
        search.wait_s = wait_s
        search.evict_s = evict_s
        search.matched = cached
        search.others_s = others_s

    def _wins_tie(self, search: PrefixChoice) -> bool:
        """Tell whether an equal is taken in place of the best: holders are drawn, the others come in turn."""
        if not search.draws:
            return False
        search.ties += 1
        return self._random.random() * search.ties < 1.0

    def _evicted_s(self, load: Load, new: float, now: float) -> float:
        """Return what it costs that new tokens take the place of others; the longer these were not used, the
        less they will be missed.
        """
        age_s = now - load.holder.tail()
        return self._eviction * TOKEN_S * new * load.price * math.exp(-age_s / self._eviction_age_s)
