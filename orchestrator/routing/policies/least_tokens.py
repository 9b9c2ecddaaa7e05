"""This policy chooses the worker with the fewest prompt tokens under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from orchestrator.routing.policies.base import (
    Appraisal,
    Argument,
    C,
    Choice,
    Context,
    Explanation,
    Outcome,
    Policy,
    PolicySpec,
    Request,
    explained,
)

# Legs of other processes count as the mean of the prompts seen here, in which the newest has this weight.
NEWEST: Final = 0.02
LOOKED_AT: Final = 64  # workers per choice; the best of so many is mostly among the best two of a hundred
SPARE: Final = 64  # workers that are not there any more and may stay in memory
# A token under way makes an answer of 300 tokens so much longer: 40 ns per step to read its KV cache, on a
# 70B-class model on eight H100.
TOKEN_S: Final = 300 * 40e-9


class Tokens:
    """A worker has so much under way by the choices of this policy."""

    __slots__ = ("legs", "tokens")

    def __init__(self) -> None:
        self.legs = 0
        self.tokens = 0.0


class TokenChoice(Choice[Any]):
    """It remembers what its worker had to do, and what came on top."""

    __slots__ = ("before", "load", "tokens", "why")

    def __init__(self, worker: Any, policy: Policy, load: Tokens, before: float, tokens: float) -> None:
        super().__init__(worker, "", policy)
        self.load = load
        self.before = before
        self.tokens = tokens
        self.why: object | None = None  # instead of our own reason

    def __str__(self) -> str:
        if self.why is not None:
            return str(self.why)
        return (
            f"It has the fewest tokens under way: {self.before:.0f}, and {self.tokens:.0f} of this request."
        )

    def terms(self) -> dict[str, float]:
        return {"tokens": self.before, "own_tokens": self.tokens}


class TokensAppraisal(Appraisal):
    def __init__(self, policy: LeastTokens, request: Request, candidates: Sequence[Any]) -> None:
        super().__init__()
        self._policy = policy
        self._request = request
        self._candidates = candidates

    def add(self, index: int, tokens: float) -> None:
        self.indexes.append(index)
        self.costs.append(TOKEN_S * tokens)

    def take(self, index: int, why: object | None = None) -> Choice[Any]:
        return self._policy.taken(self._request, self._candidates, index, why)


class LeastTokens(Policy):
    def __init__(self, context: Context, leg_tokens: int = 5000) -> None:
        self._leg_tokens = leg_tokens
        self._decodes = context.role != "prefill"
        self._loads: dict[str, Tokens] = {}
        self._mean = 0.0
        self._first = -1  # at which of the candidates the last search began, or ended if they are many

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the least loaded; equals take turns. Of a pool of more than `LOOKED_AT` workers so many are
        looked at, in turn.
        """
        count = len(candidates)
        first = (self._first + 1) % count
        last = first + min(count, LOOKED_AT)
        self._note_turn(count)
        best = candidates[first]
        load = self._load_of(best, count)
        least = self._under_way(best, load)
        if least == 0.0:
            return self._chosen(request, best, load, least)
        for index in range(first + 1 - count, last - count):  # negative ones are the last
            candidate = candidates[index]
            other = self._load_of(candidate, count)
            tokens = self._under_way(candidate, other)
            if tokens < least:
                best, load, least = candidate, other, tokens
                if tokens == 0.0:  # nobody has fewer
                    break
        return self._chosen(request, best, load, least)

    def _note_turn(self, count: int) -> None:
        """Let the next search begin elsewhere."""
        first = (self._first + 1) % count
        self._first = (first + LOOKED_AT) % count if count > LOOKED_AT else first

    def _chosen(self, request: Request, worker: C, load: Tokens, before: float) -> TokenChoice:
        tokens = float(request.prompt_tokens() + self._leg_tokens)
        load.legs += 1
        load.tokens += tokens
        self._mean += (tokens - self._mean) * (NEWEST if self._mean else 1.0)
        return TokenChoice(worker, self, load, before, tokens)

    def _under_way(self, candidate: C, load: Tokens) -> float:
        """Return the tokens there; legs of other processes count with the mean."""
        others = candidate.in_flight - load.legs
        return load.tokens + others * self._mean if others > 0 else load.tokens

    def _load_of(self, candidate: C, count: int) -> Tokens:
        found = self._loads.get(candidate.name)
        if found is None:
            if len(self._loads) > 2 * count + SPARE:
                self._loads = {name: load for name, load in self._loads.items() if load.legs}
            found = self._loads[candidate.name] = Tokens()
        return found

    # --- without a choice -----------------------------------------------------------------------

    def reckons_seconds(self) -> bool:
        return self._decodes

    def appraise(self, request: Request, candidates: Sequence[Any]) -> Appraisal | None:
        if not self._decodes:  # how long a prefill takes depends on what is cached, too
            return None
        made = TokensAppraisal(self, request, candidates)
        count = len(candidates)
        first = (self._first + 1) % count
        for index in range(
            first - count, first + min(count, LOOKED_AT) - count
        ):  # negative ones are the last
            candidate = candidates[index]
            made.add(index % count, self._under_way(candidate, self._load_of(candidate, count)))
        return made

    def taken(
        self, request: Request, candidates: Sequence[Any], index: int, why: object | None
    ) -> TokenChoice:
        """Choose the candidate with this index: it was appraised."""
        self._note_turn(len(candidates))
        worker = candidates[index]
        load = self._load_of(worker, len(candidates))
        choice = self._chosen(request, worker, load, self._under_way(worker, load))
        choice.why = why
        return choice

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        count, first, mean = len(candidates), self._first, self._mean
        loads = [self._load_of(candidate, count) for candidate in candidates]
        terms = [
            {"tokens": self._under_way(candidate, load)}
            for candidate, load in zip(candidates, loads, strict=True)
        ]
        choice = self.choose(request, candidates)
        told = explained(choice, candidates, terms)
        before = loads[told.index]
        before.legs -= 1
        before.tokens -= choice.terms()["own_tokens"]  # exact: these are whole numbers
        self._first, self._mean = first, mean
        return told

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        if isinstance(choice, TokenChoice):
            load = choice.load
            load.legs -= 1
            load.tokens = load.tokens - choice.tokens if load.legs else 0.0


SPEC: Final = PolicySpec(
    "least_tokens",
    LeastTokens,
    "The worker with the fewest prompt tokens under way is chosen; equals take turns.",
    [
        Argument(
            "leg_tokens",
            5000,
            "A leg counts as so many tokens beside those of its prompt: a decode step takes time for each "
            "sequence, too.",
            least=0,
        )
    ],
)
