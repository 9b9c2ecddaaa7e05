"""This policy chooses the worker at which a prompt costs the least time: its own, and that of others.

    cost = wait + (1 + q) * rate * own + evict        seconds

What each term is, and where it comes from, is in `docs/routing.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from orchestrator.routing.policies.base import (
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
    BYTES_PER_TOKEN,
    Load,
    PrefixChoice,
    Prices,
    Rates,
    Sent,
    ShortChoice,
    seconds,
)
from orchestrator.routing.policies.prefix_notes import HEAD, HEAD_BYTES, note
from orchestrator.routing.policies.prefix_search import LEAST_TOKENS, Asked, Search
from orchestrator.routing.policies.prefix_workers import Workers

_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python


class PrefixAppraisal(Prices):
    def __init__(self, policy: Prefix, asked: Asked) -> None:
        super().__init__(asked.tokens)
        self._policy = policy
        self.asked = asked

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
        self._share = context.share
        self._model = context.model
        learns = context.role == "prefill"  # other legs last for as long as their answers
        self._loads: dict[str, Load] = {}  # all workers that are known, by name
        self._index = index = PrefixIndex(self._index_bytes(memory_mb * 1_000_000))
        self._rates = rates = Rates(self._loads)
        self._workers = workers = Workers(
            self._loads, index, rates, kept, kv_tokens, drift, drift_s, learns=learns
        )
        self._search = Search(
            self, index, workers, rates, context.random, context.time, fan_out, eviction, eviction_age_s
        )

    def _index_bytes(self, memory: int) -> int:
        """Return what of the memory that the policy may take is the index's."""
        return memory

    # --- choosing -------------------------------------------------------------------------------

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the worker at least cost; equals take turns, or chance decides. Costs of a pool of more than
        `LOOKED_AT` workers are reckoned for those that know the prompt, and for so many others in turn.
        """
        if candidates is not self._workers.candidates:
            self._note_candidates(candidates)
        tokens = request.prompt_tokens()
        if tokens < LEAST_TOKENS:  # nothing of it is read, looked for or remembered
            short = self._search.short(candidates, tokens)
            short.load.add(short, short.began)
            if self._share is not None:
                self._tell_short(self._share, short)
            return short
        asked = self._asked(request, candidates)
        while True:
            found = self._search.found(asked)
            choice = self._search.cheapest(asked, found, None)
            if self._is_settled(candidates, choice, found):
                return choice

    def _tell_short(self, share: Callable[[bytes], None], choice: ShortChoice) -> None:
        """Tell other processes of a leg that will count as what it takes, not as the mean."""
        self._search.note_expected(choice.expected_s)
        share(note(choice.load, choice.expected_s, b""))

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
        if candidates is not self._workers.candidates:
            self._note_candidates(candidates)
        return Asked(request, candidates, self._seed(request.model), self._salt(request))

    def _note_candidates(self, candidates: Sequence[Any]) -> bool:
        """Note who may be chosen now; True if workers were forgotten that are not there any more."""
        return self._workers.note(candidates)

    def _salt(self, request: Request) -> bytes:
        """Return what a policy that knows tokens tells prompts with equal ones apart by."""
        return b""

    def _seed(self, model: str) -> int:
        """Return what tells prompts for adapters apart: they share no cache."""
        return 0 if model == self._model else xxh3_64_intdigest(model)

    def _is_settled(self, candidates: Sequence[Any], choice: PrefixChoice, found: Found | None) -> bool:
        """Note what was chosen; False if the worker has come back since it was last looked at."""
        load = choice.load
        choice.worker = worker = candidates[load.index]
        if worker.epoch != load.epoch:
            self._workers.note_return(load, worker.epoch)
            return False
        choice.expects = choice.matched
        if not load.prediction.is_trusted and found is not None and found.steps:
            choice.expects = self._search.expected(choice, found)
        choice.expected_s = seconds(choice.tokens, choice.matched)
        load.add(choice, choice.began)
        if found is not None:
            choice.hashes = found.hashes
            self._index.record(load.holder, found, choice.began)
        self._search.note_expected(choice.expected_s)
        if self._share is not None:
            self._share(note(load, choice.expected_s, choice.hashes))
        return True

    # --- without a choice -----------------------------------------------------------------------

    def reckons_seconds(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """Return how long legs take at most workers, by what is expected at a rate of 1."""
        return self._rates.scale

    @property
    def queued(self) -> float:
        """Return the mean number of legs under way per worker of the last choice or appraisal."""
        return self._search.queued

    def appraise(self, request: Request, candidates: Sequence[Any]) -> PrefixAppraisal:
        asked = self._asked(request, candidates)
        made = PrefixAppraisal(self, asked)
        self._search.cheapest(asked, self._search.found(asked), made)
        return made

    def looked_at(self, asked: Asked, index: int) -> PrefixChoice:
        """Return what a request would find at the candidate with this index; nothing is chosen."""
        return self._look(asked, index, self._search.found(asked))

    def _look(self, asked: Asked, index: int, found: Found | None) -> PrefixChoice:
        if asked.candidates is not self._workers.candidates:  # others were looked at since
            self._note_candidates(asked.candidates)
        return self._search.look(asked, index, found)

    def taken(self, asked: Asked, index: int, why: object | None) -> PrefixChoice:
        """Choose the candidate with this index."""
        self._search.note_turn(len(asked.candidates))
        while True:
            found = self._search.found(asked)
            choice = self._look(asked, index, found)
            if self._is_settled(asked.candidates, choice, found):
                choice.why = why
                return choice

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        asked, search = self._asked(request, candidates), self._search
        first, queued = search.first, search.queued
        found = search.found(asked)
        choice = self._explained(asked, found)
        terms = [self._look(asked, index, found).terms() for index in range(len(candidates))]
        search.first, search.queued = first, queued
        return Explanation(choice.load.index, str(choice), terms)

    def _explained(self, asked: Asked, found: Found | None) -> Sent:
        """Return what `choose` would."""
        if asked.tokens >= LEAST_TOKENS:
            return self._search.cheapest(asked, found, None)
        return self._search.short(asked.candidates, int(asked.tokens))

    def prediction(self, worker: str) -> Prediction | None:
        load = self._loads.get(worker)
        return None if load is None else load.prediction

    # --- learning -------------------------------------------------------------------------------

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        if isinstance(choice, PrefixChoice) and choice in choice.load.legs:  # else the worker has come back
            choice.load.end(choice, outcome, _note_answer(choice, outcome))

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


def _note_answer(choice: PrefixChoice, outcome: Outcome) -> float:
    """Compare what was expected in the cache with what was there; return how many seconds the leg should have
    taken with that.
    """
    cached = outcome.cached_tokens
    if cached is None or outcome.end is not _ANSWERED:
        return seconds(choice.tokens, choice.matched)
    _note_prediction(choice, outcome, cached)
    return seconds(choice.tokens, min(float(cached), choice.tokens))


def _note_prediction(choice: PrefixChoice, outcome: Outcome, cached: int) -> None:
    """Tokens are those that the worker counts."""
    counted = outcome.prompt_tokens()
    tokens = choice.tokens if counted is None else float(counted)
    expects = choice.expects
    if choice.tokens > 0.0:
        expects *= tokens / choice.tokens
    choice.load.prediction.note(tokens, expects, float(cached), outcome.moment)


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
