"""This policy chooses the worker at which a prompt costs the least time: its own, and that of others.

    cost = wait + (1 + q) * rate * own + evict        seconds

What each term is, and where it comes from, is in `docs/routing.md`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from orchestrator.routing.policies.base import (
    Appraisal,
    Argument,
    C,
    Choice,
    Context,
    End,
    Explanation,
    Outcome,
    Policy,
    PolicySpec,
    Request,
)
from orchestrator.routing.policies.prefix_index import (
    FINE,
    MOST_BYTES,
    WIDTH,
    Found,
    Holder,
    PrefixIndex,
    bytes_of,
    hashed,
)

# Seconds of prefill of a 70B-class model on eight H100: fixed, per token, per square of tokens. Only how they
# stand to each other matters much: how far all workers and each of them are off is learned.
FIXED_S: Final = 0.020
TOKEN_S: Final = 90e-6
TOKEN2_S: Final = 0.6e-9

BYTES_PER_TOKEN: Final = 4
LEAST_TOKENS: Final = FINE // BYTES_PER_TOKEN  # of a prompt with a whole step
MOST_QUEUED: Final = 4.0  # legs per worker that added work delays; more say nothing more
MOST_SHARED: Final = 4096  # bytes of hashes that other processes are told of one choice
MOST_NAME: Final = 1000  # bytes of a worker's name there
MOST_MS: Final = (1 << 32) - 1

LOOKED_AT: Final = 64  # workers without the prompt per choice; of a larger pool these go round
MOST_FOUND: Final = 64  # workers with some of it are looked at one by one

# Rates: the newest leg has this weight, the first legs more; a worker this near to the others counts as they
# do, so that noise does not keep them apart; all are compared after so many legs.
NEWEST: Final = 0.1
SURE: Final = 10  # legs
BAND: Final = 0.1
COMPARED: Final = 16
LEAST_RATE: Final = 1e-4
MOST_RATE: Final = 1e4

MOST_HEARD: Final = 64  # legs of other processes that are remembered of a worker
SPARE: Final = 64  # workers that are not there any more and may stay in memory
_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python


def seconds(tokens: float, cached: float) -> float:
    """Return how long a prefill takes at a rate of 1, if so many of its tokens are cached."""
    return FIXED_S + TOKEN_S * (tokens - cached) + TOKEN2_S * (tokens * tokens - cached * cached)


class Load:
    """This is a worker as the policy knows it: its legs, its speed, and what its cache should hold."""

    __slots__ = (
        "began",
        "epoch",
        "expected_s",
        "floor_s",
        "free_at",
        "heard",
        "holder",
        "index",
        "legs",
        "mark",
        "name",
        "price",
        "rate",
        "seen",
        "stamp",
    )

    def __init__(self, name: str, holder: Holder, rate: float) -> None:
        self.name = name
        self.holder = holder
        self.epoch = -1
        self.legs: list[PrefixChoice] = []  # in the order in which they were sent
        self.expected_s = 0.0  # of all of them together, at a rate of 1
        self.began = 0.0  # when the first of them can have begun
        self.heard: list[float] = []  # expected seconds of the newest legs that other processes sent
        self.rate = rate  # measured by expected
        self.price = rate  # that is reckoned with
        self.seen = 0  # legs that the rate was learned from
        # Derived, for `wait`: when all legs should have ended; what all but the first take.
        self.free_at = 0.0
        self.floor_s = 0.0
        # Of the present choice.
        self.stamp = -1  # of the candidates that it was last among
        self.index = -1  # among those
        self.mark = -1  # the number of the search that has looked at it

    def add(self, leg: PrefixChoice, now: float) -> None:
        own_s = leg.expected_s * self.price
        if self.legs:
            self.free_at += own_s
            self.floor_s += own_s
        else:
            self.began = now
            self.free_at = now + own_s
        self.legs.append(leg)
        self.expected_s += leg.expected_s

    def drop(self, leg: PrefixChoice, now: float) -> None:
        """Take a leg out that has ended; the next one can have begun now. `settle` is to follow."""
        legs = self.legs
        if legs[0] is leg:
            del legs[0]
            self.began = now
        else:
            legs.remove(leg)
        self.expected_s = self.expected_s - leg.expected_s if legs else 0.0

    def become(self, scale: float) -> None:
        """Reckon with its rate as it stands to the `scale` of all; a small difference is none. `settle` is to
        follow.
        """
        if not self.seen:
            self.rate = scale
        relative = self.rate / scale
        if relative > 1.0 + BAND:
            relative -= BAND
        elif relative < 1.0 - BAND:
            relative += BAND
        else:
            relative = 1.0
        self.price = scale * relative

    def settle(self) -> None:
        """Reckon anew what `wait` goes by."""
        first = self.legs[0].expected_s if self.legs else 0.0
        self.free_at = self.began + self.expected_s * self.price
        self.floor_s = (self.expected_s - first) * self.price

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
        left = self.free_at - now
        return left if left > self.floor_s else self.floor_s


class PrefixChoice(Choice[Any]):
    """It is the cheapest worker for one request of those that were looked at; and remembers, once it is made,
    what its leg is expected to take.
    """

    __slots__ = (
        "began",
        "cost",
        "delayed",
        "draws",
        "evict_s",
        "expected_s",
        "load",
        "matched",
        "others_s",
        "prices",
        "ties",
        "tokens",
        "wait_s",
        "why",
    )

    def __init__(self, worker: Any, policy: Policy, now: float, tokens: float, delayed: float) -> None:
        """`delayed` is how often each second of work counts: once, and once for each leg behind it."""
        self.worker = worker
        self.policy = policy
        self.began = now
        self.tokens = tokens
        self.delayed = delayed
        self.load: Load | None = None
        self.cost = 0.0
        self.wait_s = 0.0
        self.evict_s = 0.0
        self.matched = 0.0  # tokens of the prompt that should be in the worker's cache
        self.others_s = 0.0  # expected of legs of other processes, at a rate of 1
        self.expected_s = 0.0  # of its own leg, at a rate of 1
        self.ties = 1
        self.draws = True  # equals are drawn; else the first one stays
        self.prices: PrefixAppraisal | None = None  # what all workers cost goes there, and none is kept
        self.why: object | None = None  # instead of our own reason

    def prompt_tokens(self) -> float:
        return self.tokens

    def prefill_s(self) -> float:
        """Return the seconds that the prompt takes there, without what is before it."""
        return seconds(self.tokens, self.matched) * (self.load.price if self.load is not None else 1.0)

    def terms(self) -> dict[str, float]:
        return {
            "cost_s": self.cost,
            "wait_s": self.wait_s,
            "own_s": self.cost - self.wait_s - self.evict_s,
            "evict_s": self.evict_s,
            "tokens": self.tokens,
            "cached_tokens": self.matched,
            "rate": self.load.price if self.load is not None else 1.0,
        }

    def __str__(self) -> str:
        if self.why is not None:
            return str(self.why)
        own_s = self.cost - self.wait_s - self.evict_s
        return (
            f"It costs the least, {self.cost:.3f} s: {self.wait_s:.3f} for legs under way, {own_s:.3f} for "
            f"{self.tokens - self.matched:.0f} of {self.tokens:.0f} tokens that are new there, "
            f"{self.evict_s:.3f} for what they evict."
        )

    def own_s(self) -> float:
        return self.expected_s * self.load.price if self.load is not None else -1.0


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

    __slots__ = ("candidates", "hashes", "per_byte", "request", "tokens")

    def __init__(self, request: Request, candidates: Sequence[Any], seed: int) -> None:
        """`seed` tells prompts apart that share no cache."""
        self.candidates = candidates
        self.tokens = tokens = float(request.prompt_tokens())
        self.hashes = b""
        self.per_byte = 1 / BYTES_PER_TOKEN
        if tokens >= LEAST_TOKENS:
            prompt = request.prompt(MOST_BYTES)
            self.hashes = hashed(prompt, seed)
            if 0 < len(prompt) < MOST_BYTES:
                self.per_byte = tokens / len(prompt)


class PrefixAppraisal(Appraisal):
    """Beside each cost it has how many tokens of the prompt should be in the worker's cache."""

    def __init__(self, policy: Prefix, asked: Asked) -> None:
        super().__init__(asked.tokens)
        self._policy = policy
        self.asked = asked
        self.cached: list[float] = []

    def add(self, index: int, cost: float, cached: float) -> None:
        self.indexes.append(index)
        self.costs.append(cost)
        self.cached.append(cached)

    def look(self, index: int) -> PrefixChoice:
        """Return what the request would find at this candidate; nothing is chosen."""
        return self._policy.looked_at(self.asked, index)

    def take(self, index: int, why: object | None = None) -> PrefixChoice:
        return self._policy.taken(self.asked, index, why)


class Prefix(Policy):
    def __init__(
        self,
        context: Context,
        fan_out: float,
        eviction: float,
        eviction_age_s: float,
        kept: float,
        kv_tokens: int,
        memory_mb: int,
    ) -> None:
        self._time = context.time
        self._random = context.random
        self._share = context.share
        self._model = context.model
        self._learns_rates = context.role == "prefill"  # other legs last for as long as their answers
        self._fan_out = fan_out
        self._eviction = eviction
        self._eviction_age_s = eviction_age_s
        self._kept = kept
        self._kv_tokens = kv_tokens
        self._index = PrefixIndex(memory_mb * 1_000_000)
        self._loads: dict[str, Load] = {}
        self._by_slot: dict[int, Load] = {}  # as the index numbers them
        self._candidates: Sequence[Any] | None = None  # those of the last choice, if they cannot change
        self._present: list[Load] = []  # by index among the candidates
        self._stamp = 0  # of `_present`
        self._first = -1  # at which of the candidates the last search began, or ended if they are many
        self._mark = 0  # the number of the search
        self._queued = 0.0  # the mean number of legs per worker, as the last search has it
        self._mean_s = 0.0  # expected, per leg
        self._scale = 1.0  # the median rate
        self._ends = 0

    # --- choosing -------------------------------------------------------------------------------

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the worker at least cost; equals take turns, or chance decides. Costs of a pool of more than
        `LOOKED_AT` workers are reckoned for those that know the prompt, and for so many others in turn.
        """
        asked = self._asked(request, candidates)
        while True:
            found = self._found(asked)
            search = self._searched(asked, found, None)
            if self._is_settled(candidates, search, found):
                return search

    def _asked(self, request: Request, candidates: Sequence[Any]) -> Asked:
        if candidates is not self._candidates:
            self._note_candidates(candidates)
        return Asked(request, candidates, self._seed(request.model))

    def _found(self, asked: Asked) -> Found | None:
        return self._index.find(asked.hashes) if asked.hashes else None

    def _seed(self, model: str) -> int:
        """Return what tells prompts for adapters apart: they share no cache."""
        return 0 if model == self._model else xxh3_64_intdigest(model)

    def _note_turn(self, count: int) -> None:
        """Let the next search begin elsewhere."""
        first = (self._first + 1) % count
        self._first = (first + LOOKED_AT) % count if count > LOOKED_AT else first

    def _searched(self, asked: Asked, found: Found | None, prices: PrefixAppraisal | None) -> PrefixChoice:
        """Look at the workers, and keep the best; if `prices` is given, only note there what all cost."""
        self._mark += 1
        candidates, tokens = asked.candidates, asked.tokens
        count = len(candidates)
        first = (self._first + 1) % count
        last = first + min(count, LOOKED_AT)
        if prices is None:
            self._note_turn(count)
        flights = [candidates[index - count].in_flight for index in range(first, last)]
        queued = sum(flights) / len(flights)
        self._queued = queued = queued if queued < MOST_QUEUED else MOST_QUEUED
        delayed = 1.0 + queued
        search = PrefixChoice(candidates[0], self, self._time(), tokens, delayed)
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
        present = self._present
        for index in range(first, last):
            load = present[index - count]
            if load.mark == self._mark:
                continue
            if levels is not None:
                self._try_holder(search, candidates, levels, load)
            else:
                self._try(search, load, flights[index - first], own_s, 0.0)
        return search

    def _levels(self, found: Found, count: int, per_byte: float) -> Levels:
        levels = Levels()
        share = self._fan_out / count
        before = 0.0
        for run in found.runs:
            tokens = bytes_of(run.end) * per_byte
            levels.add(run.holders, tokens, tokens - before, share * run.fan_out)
            before = tokens
        partial = found.partial
        if partial is not None:
            tokens = bytes_of(found.steps) * per_byte
            levels.add(partial.holders, tokens, tokens - before, share * partial.fan_out)
        return levels

    def _search_holders(self, search: PrefixChoice, candidates: Sequence[C], levels: Levels) -> bool:
        """Look at those who have some of the prompt, most of it first. False if they are too many."""
        done, looked_at = 0, 0
        for level in range(len(levels.holders) - 1, -1, -1):
            left = levels.holders[level] & ~done
            done |= left
            while left:
                bit = left & -left
                left ^= bit
                load = self._by_slot[bit.bit_length() - 1]
                if load.stamp != self._stamp:
                    continue  # it is no candidate
                if looked_at == MOST_FOUND:
                    return False
                looked_at += 1
                self._try_at(search, candidates, levels, level, load)
        return True

    def _try_holder(self, search: PrefixChoice, candidates: Sequence[C], levels: Levels, load: Load) -> None:
        """Look at one that may have some of the prompt."""
        level = len(levels.holders) - 1
        while level >= 0 and not levels.holders[level] & load.holder.bit:
            level -= 1
        self._try_at(search, candidates, levels, level, load)

    def _try_at(
        self, search: PrefixChoice, candidates: Sequence[C], levels: Levels, level: int, load: Load
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
        wait_s = load.free_at - search.began  # as `Load.wait` has it, without a call
        if wait_s < load.floor_s:
            wait_s = load.floor_s
        others = in_flight - len(load.legs)
        others_s = 0.0
        if others > 0:  # legs of other processes: how many there are is known at once
            others_s = load.others_s(others, self._mean_s)
            wait_s += others_s * load.price
        evict_s = 0.0
        new = search.tokens - cached
        if load.holder.size + new * BYTES_PER_TOKEN > load.holder.capacity and load.holder.runs:
            evict_s = self._evicted_s(load, new, search.began)
        cost = wait_s + search.delayed * load.price * own_s + evict_s
        if search.prices is not None:
            search.prices.add(load.index, cost, cached)
            return
        if search.load is not None:
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

    def _is_settled(self, candidates: Sequence[C], choice: PrefixChoice, found: Found | None) -> bool:
        """Note what was chosen; False if the worker has come back since it was last looked at."""
        load = choice.load
        if load is None:
            return False  # never: there are candidates
        choice.worker = worker = candidates[load.index]
        if worker.epoch != load.epoch:
            self._note_return(load, worker.epoch)
            return False
        choice.expected_s = seconds(choice.tokens, choice.matched)
        load.add(choice, choice.began)
        self._mean_s += (choice.expected_s - self._mean_s) * (NEWEST if self._mean_s else 1.0)
        if found is not None:
            self._index.record(load.holder, found, choice.began)
        if self._share is not None:
            self._share(_note(load, choice.expected_s, b"" if found is None else found.hashes))
        return True

    # --- without a choice -----------------------------------------------------------------------

    def reckons_seconds(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """Return how long legs take at most workers, by what is expected at a rate of 1."""
        return self._scale

    @property
    def queued(self) -> float:
        """Return the mean number of legs under way per worker of the last choice or appraisal."""
        return self._queued

    def appraise(self, request: Request, candidates: Sequence[Any]) -> PrefixAppraisal:
        asked = self._asked(request, candidates)
        made = PrefixAppraisal(self, asked)
        self._searched(asked, self._found(asked), made)
        return made

    def looked_at(self, asked: Asked, index: int) -> PrefixChoice:
        """Return what a request would find at the candidate with this index; nothing is chosen."""
        return self._look(asked, index, self._found(asked))

    def _look(self, asked: Asked, index: int, found: Found | None) -> PrefixChoice:
        candidates = asked.candidates
        if candidates is not self._candidates:  # others were looked at since
            self._note_candidates(candidates)
        look = PrefixChoice(candidates[index], self, self._time(), asked.tokens, 1.0 + self._queued)
        levels = Levels()
        if found is not None and found.steps:
            levels = self._levels(found, len(candidates), asked.per_byte)
        self._try_holder(look, candidates, levels, self._present[index])
        return look

    def taken(self, asked: Asked, index: int, why: object | None) -> PrefixChoice:
        """Choose the candidate with this index."""
        self._note_turn(len(asked.candidates))
        while True:
            found = self._found(asked)
            choice = self._look(asked, index, found)
            if self._is_settled(asked.candidates, choice, found):
                choice.why = why
                return choice

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        asked = self._asked(request, candidates)
        first = self._first
        found = self._found(asked)
        choice = self._searched(asked, found, None)
        self._first = first
        terms = [self._look(asked, index, found).terms() for index in range(len(candidates))]
        return Explanation(choice.load.index if choice.load is not None else 0, str(choice), terms)

    # --- workers --------------------------------------------------------------------------------

    def _note_candidates(self, candidates: Sequence[Any]) -> None:
        """Note who may be chosen now. What cannot change need not be looked at again."""
        self._candidates = candidates if isinstance(candidates, tuple) else None
        self._stamp += 1
        self._present = []
        for index in range(len(candidates)):
            candidate = candidates[index]
            load = self._loads.get(candidate.name)
            if load is None:
                load = self._new_load(candidate.name)
            if load.epoch != candidate.epoch:
                self._note_return(load, candidate.epoch)
            load.stamp = self._stamp
            load.index = index
            load.holder.capacity = self._capacity(candidate.kv_tokens or self._kv_tokens)
            self._present.append(load)
        if len(self._loads) > 2 * len(candidates) + SPARE:
            self._forget_absent()

    def _new_load(self, name: str) -> Load:
        holder = self._index.holder(self._capacity(self._kv_tokens))
        load = Load(name, holder, self._scale)
        self._loads[name] = self._by_slot[holder.slot] = load
        return load

    def _capacity(self, kv_tokens: int) -> int:
        """Return how many bytes of prompt are remembered of a worker with so large a KV cache."""
        return int(self._kept * kv_tokens * BYTES_PER_TOKEN)

    def _note_return(self, load: Load, epoch: int) -> None:
        """Note that a worker has come back: its cache may be empty, and its legs have been lost."""
        load.epoch = epoch
        load.legs = []
        load.expected_s = 0.0
        load.settle()
        self._index.clear(load.holder)

    def _forget_absent(self) -> None:
        for name, load in list(self._loads.items()):
            if load.stamp != self._stamp and not load.legs:
                self._index.remove(load.holder)
                del self._loads[name]
                del self._by_slot[load.holder.slot]

    # --- learning -------------------------------------------------------------------------------

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        if not isinstance(choice, PrefixChoice):
            return
        load = choice.load
        if load is None or choice not in load.legs:
            return  # it was sent to the worker as it was before
        if self._learns_rates and outcome.end is _ANSWERED and choice.others_s == 0.0:
            began = choice.began if choice.began > load.began else load.began
            cached = outcome.cached_tokens
            known = choice.matched if cached is None else min(float(cached), choice.tokens)
            self._learn(load, (outcome.moment - began) / seconds(choice.tokens, known))
        load.drop(choice, outcome.moment)
        load.settle()

    def _learn(self, load: Load, ratio: float) -> None:
        """Note how long a leg took, by what was expected at a rate of 1."""
        if not LEAST_RATE < ratio < MOST_RATE:
            ratio = min(max(ratio, LEAST_RATE), MOST_RATE)
        load.seen += 1
        load.rate += (ratio - load.rate) * (NEWEST if load.seen > SURE else 1.0 / load.seen)
        self._ends += 1
        if self._ends <= COMPARED or self._ends % max(COMPARED, len(self._loads)) == 0:
            self._compare()
        else:
            load.become(self._scale)

    def _compare(self) -> None:
        """Find the median rate, and what is reckoned with for each worker."""
        rates = sorted([load.rate for load in self._loads.values() if load.seen])
        self._scale = rates[len(rates) // 2]
        for load in self._loads.values():
            load.become(self._scale)
            load.settle()

    def hear(self, note: bytes) -> None:
        """Hear which worker another process has sent a prompt to."""
        if len(note) < HEAD_BYTES:
            return
        epoch, expected_ms, length = HEAD.unpack_from(note)
        name = note[HEAD_BYTES : HEAD_BYTES + length]
        hashes = note[HEAD_BYTES + length :]
        load = self._loads.get(name.decode("utf-8", "replace"))
        if load is not None and load.epoch == epoch and len(hashes) % WIDTH == 0:
            load.hear(expected_ms / 1000)
            self._index.record(load.holder, self._index.find(hashes), self._time())


# What other processes are told of a choice: the worker's epoch, the milliseconds that the leg is expected to
# take at a rate of 1, and how long its name is; then the name, and hashes.
HEAD: Final = struct.Struct("<QIH")
HEAD_BYTES: Final = 14


def _note(load: Load, expected_s: float, hashes: bytes) -> bytes:
    name = load.name.encode()[:MOST_NAME]
    expected_ms = min(int(expected_s * 1000), MOST_MS)
    return HEAD.pack(load.epoch, expected_ms, len(name)) + name + hashes[:MOST_SHARED]


SPEC: Final = PolicySpec(
    "prefix",
    Prefix,
    "The worker is chosen at which a prompt costs the least time, its own and that of others, by what should "
    "be in its cache and what it has to do; equals take turns.",
    [
        Argument(
            "fan_out",
            3.0,
            "Tokens that many different prompts go on from cost less to compute once more, the more the "
            "larger this is.",
            least=0,
        ),
        Argument(
            "eviction",
            3.0,
            "A token that is evicted just after it was used costs so many times what a new one does.",
            least=0,
        ),
        Argument(
            "eviction_age_s",
            300.0,
            "That cost is about a third for what was not used for this many seconds.",
            least=1,
        ),
        Argument(
            "kept",
            1.0,
            "So many times the tokens that fit into a worker's KV cache are remembered of it; too few cost "
            "more than too many.",
            least=0.01,
            most=100,
        ),
        Argument(
            "kv_tokens",
            1_000_000,
            "So many tokens fit into the KV cache of a worker that does not say how many.",
            least=1,
        ),
        Argument(
            "memory_mb",
            256,
            "The index takes at most so much memory, in each process; what is oldest is forgotten first.",
            least=1,
        ),
    ],
)
