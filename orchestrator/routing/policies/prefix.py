"""This policy chooses the worker at which a prompt costs the least time: its own, and that of others.

    cost = wait + (1 + q) * rate * own + evict        seconds

What each term is, and where it comes from, is in `docs/routing.md`.
"""

from __future__ import annotations

import math
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
from orchestrator.routing.policies.prediction import Prediction
from orchestrator.routing.policies.prefix_index import MOST_BYTES, WIDTH, Found, PrefixIndex, bytes_of, hashed
from orchestrator.routing.policies.prefix_legs import (
    COMPARED,
    FIXED_S,
    LEAST_RATE,
    MOST_RATE,
    NEWEST,
    SURE,
    TOKEN_S,
    Load,
    PrefixChoice,
    seconds,
)
from orchestrator.routing.policies.prefix_notes import HEAD, HEAD_BYTES, note
from orchestrator.routing.policies.prefix_search import BYTES_PER_TOKEN, LEAST_TOKENS, Asked, Levels, level_of

MOST_QUEUED: Final = 4.0  # legs per worker that added work delays; more say nothing more

LOOKED_AT: Final = 64  # workers without the prompt per choice; of a larger pool these go round
MOST_FOUND: Final = 64  # workers with some of it are looked at one by one

SPARE: Final = 64  # workers that are not there any more and may stay in memory
_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python


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
        drift: float,
        drift_s: float,
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
        self._drift = drift
        self._drift_s = drift_s
        self._index = PrefixIndex(self._index_bytes(memory_mb * 1_000_000))
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

    def _index_bytes(self, memory: int) -> int:
        """Return what of the memory that the policy may take is the index's."""
        return memory

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

    def new_tokens(self, request: Request) -> float:
        """Estimate the same by what any worker is remembered to have."""
        tokens = float(request.prompt_tokens())
        if tokens < LEAST_TOKENS:
            return tokens
        prompt = request.prompt(MOST_BYTES)
        steps = self._index.find(hashed(prompt, self._seed(request.model))).steps
        per_byte = tokens / len(prompt) if 0 < len(prompt) < MOST_BYTES else 1 / BYTES_PER_TOKEN
        return max(tokens - bytes_of(steps) * per_byte, 1.0)

    def _asked(self, request: Request, candidates: Sequence[Any]) -> Asked:
        if candidates is not self._candidates:
            self._note_candidates(candidates)
        return Asked(request, candidates, self._seed(request.model), self._salt(request))

    def _salt(self, request: Request) -> bytes:
        """Return what a policy that knows tokens tells prompts with equal ones apart by."""
        return b""

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
        search = PrefixChoice(candidates[0], self, self._time(), tokens, asked.per_byte, delayed)
        search.prices = prices
        search.salt = asked.salt
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
                if load.stamp != self._stamp or not load.prediction.is_trusted:
                    continue  # it is no candidate, or one like those that have nothing of it
                if looked_at == MOST_FOUND:
                    return False
                looked_at += 1
                self._try_at(search, candidates, levels, level, load)
        return True

    def _try_holder(self, search: PrefixChoice, candidates: Sequence[C], levels: Levels, load: Load) -> None:
        """Look at one that may have some of the prompt."""
        level = level_of(levels, load) if load.prediction.is_trusted else -1
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
        holder = load.holder
        is_full = holder.size + new * BYTES_PER_TOKEN > holder.full_at
        if is_full and holder.runs and load.prediction.is_trusted:
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
        choice.expects = choice.matched
        if not load.prediction.is_trusted and found is not None and found.steps:
            choice.expects = self._expected(load, found, len(candidates), choice)
        choice.expected_s = seconds(choice.tokens, choice.matched)
        load.add(choice, choice.began)
        self._mean_s += (choice.expected_s - self._mean_s) * (NEWEST if self._mean_s else 1.0)
        if found is not None:
            choice.hashes = found.hashes
            self._index.record(load.holder, found, choice.began)
        if self._share is not None:
            self._share(note(load, choice.expected_s, b"" if found is None else found.hashes))
        return True

    def _expected(self, load: Load, found: Found, count: int, choice: PrefixChoice) -> float:
        """Return how many tokens of the prompt should be in the cache of a worker that is not trusted."""
        levels = self._levels(found, count, choice.per_byte)
        level = level_of(levels, load)
        return min(levels.tokens[level], max(choice.tokens - 1.0, 0.0)) if level >= 0 else 0.0

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
        delayed = 1.0 + self._queued
        look = PrefixChoice(candidates[index], self, self._time(), asked.tokens, asked.per_byte, delayed)
        look.salt = asked.salt
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
            load.announced = self._capacity(candidate.kv_tokens or self._kv_tokens)
            self._set_capacity(load)
            self._present.append(load)
        if len(self._loads) > 2 * len(candidates) + SPARE:
            self._forget_absent()

    def _new_load(self, name: str) -> Load:
        holder = self._index.holder(self._capacity(self._kv_tokens))
        load = Load(name, holder, self._scale, Prediction(self._drift, self._drift_s))
        self._loads[name] = self._by_slot[holder.slot] = load
        return load

    def _set_capacity(self, load: Load) -> None:
        """Have so much remembered of a worker as fits into its cache."""
        load.holder.capacity = load.holder.full_at = load.announced

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

    def prediction(self, worker: str) -> Prediction | None:
        load = self._loads.get(worker)
        return None if load is None else load.prediction

    # --- learning -------------------------------------------------------------------------------

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        if not isinstance(choice, PrefixChoice):
            return
        load = choice.load
        if load is None or choice not in load.legs:
            return  # it was sent to the worker as it was before
        if outcome.end is _ANSWERED:
            if outcome.cached_tokens is not None:
                _note_prediction(load, choice, outcome)
            if self._learns_rates and choice.others_s == 0.0:
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


def _note_prediction(load: Load, choice: PrefixChoice, outcome: Outcome) -> None:
    """Compare what was expected in the cache with what was there, in tokens as the worker counts them."""
    counted = outcome.prompt_tokens
    cached = outcome.cached_tokens or 0
    tokens = choice.tokens if counted is None else float(counted)
    expects = choice.expects
    if choice.tokens > 0.0:
        expects *= tokens / choice.tokens
    load.prediction.note(tokens, expects, float(cached), outcome.moment)


ARGUMENTS: Final = [
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
    Argument(
        "drift",
        0.5,
        "If more than this share of the tokens that should have been in a worker's cache was not there, "
        "its cache does not count until expectations are right again.",
        least=0.01,
        most=1,
    ),
    Argument(
        "drift_s",
        10.0,
        "That is decided when it has been so for this many seconds.",
        least=0,
    ),
]

SPEC: Final = PolicySpec(
    "prefix",
    Prefix,
    "The worker is chosen at which a prompt costs the least time, its own and that of others, by what should "
    "be in its cache and what it has to do; equals take turns.",
    ARGUMENTS,
)
