"""Formulas by which other routers choose a prefill worker, for the simulator only.

Each is written from its description, with its default constants, and has an index that knows at once, and of
each worker's true size, what it was sent: better than what it has in production. Ties are drawn.

| name | of |
|---|---|
| `smg` | SGLang's model gateway (and vLLM's router), `cache_aware` |
| `llm_d` | llm-d's router: affinity filter with a gate on the wait, then tokens in flight |
| `dynamo` | NVIDIA Dynamo's KV router: prefill tokens under way, and own, less what is cached |
| `lmetric` | LMetric: new prefill tokens times batch |
| `conductor` | Mooncake's Conductor: time in the queue and of the prefill |
| `aibrix` | AIBrix's `prefix-cache` |
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any, Final

from launch.simulate.cache import PrefixCache
from launch.simulate.view import SimulatedRequest
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import C, Choice, Context, Outcome, Policy, PolicySpec, Request
from orchestrator.routing.policies.prefix_legs import seconds

SMG_ABSOLUTE: Final = 32  # requests: from this difference, and
SMG_RELATIVE: Final = 1.1  # this ratio on, load alone counts
SMG_MATCH: Final = 0.5  # of the prompt: from here on affinity counts
LLM_D_MATCH: Final = 0.8
LLM_D_GATE_S: Final = 18.0  # so much longer a worker with affinity may have to wait
LLM_D_RATE: Final = 15_928.0  # tokens per second, by which that wait is reckoned
AIBRIX_SPREAD: Final = 8  # requests


class Worker:
    """This is a worker as such a router knows it."""

    def __init__(self, capacity: int) -> None:
        self.index = PrefixCache(capacity)
        self.requests = 0
        self.new_tokens = 0  # of the prompts under way, not cached
        self.served = 0
        self.expected_s: list[float] = []  # of each leg under way, the first of them begun at
        self.begun = 0.0

    def wait_s(self, now: float) -> float:
        if not self.expected_s:
            return 0.0
        return sum(self.expected_s) - min(now - self.begun, self.expected_s[0])


class FormulaChoice(Choice[Any]):
    def __init__(self, chosen: Any, policy: Policy, worker: Worker, new_tokens: int, leg_s: float) -> None:
        super().__init__(chosen, "It has the least of the formula.", policy)
        self.known = worker
        self.new_tokens = new_tokens
        self.leg_s = leg_s


class Formula(Policy):
    """It keeps the books; a subclass has the formula."""

    def __init__(self, context: Context) -> None:
        self.random: Random = context.random
        self.now = context.time
        self._workers: dict[str, Worker] = {}

    @abstractmethod
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        """Return the index of the worker for a prompt of `tokens`, of which workers have `cached`."""

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        assert isinstance(request, SimulatedRequest)  # nothing else is simulated
        arrival, block = request.arrival, request.block_tokens
        workers = [self._worker(candidate, block) for candidate in candidates]
        tokens = arrival.prompt_tokens
        cached = [min(worker.index.matched(arrival.blocks) * block, tokens - 1) for worker in workers]
        index = self.chosen(workers, cached, tokens)
        worker = workers[index]
        choice = FormulaChoice(
            candidates[index], self, worker, tokens - cached[index], seconds(tokens, cached[index])
        )
        worker.index.put(arrival.blocks)
        self._begin(worker, choice)
        return choice

    def _worker(self, candidate: Any, block_tokens: int) -> Worker:
        found = self._workers.get(candidate.name)
        if found is None:
            capacity = max(1, (candidate.kv_tokens or 0) // block_tokens)
            found = self._workers[candidate.name] = Worker(capacity)
        return found

    def _begin(self, worker: Worker, choice: FormulaChoice) -> None:
        if not worker.expected_s:
            worker.begun = self.now()
        worker.expected_s.append(choice.leg_s)
        worker.requests += 1
        worker.served += 1
        worker.new_tokens += choice.new_tokens

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        assert isinstance(choice, FormulaChoice)
        worker = choice.known
        worker.expected_s.remove(choice.leg_s)
        worker.begun = self.now()
        worker.requests -= 1
        worker.new_tokens -= choice.new_tokens

    def least(self, costs: Sequence[float]) -> int:
        """Return the index of the least; equals are drawn."""
        low = min(costs)
        return self.random.choice([index for index, cost in enumerate(costs) if cost <= low])


class Smg(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        loads = [worker.requests for worker in workers]
        most, least = max(loads), min(loads)
        if most - least > SMG_ABSOLUTE and most > SMG_RELATIVE * least:
            return self.least(loads)
        best = max(cached)
        if best > SMG_MATCH * tokens:
            holders = [math.inf if found < best else load for found, load in zip(cached, loads, strict=True)]
            return self.least(holders)
        return self.least([worker.requests + worker.served * 1e-9 for worker in workers])


class LlmD(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        has_affinity = [found >= LLM_D_MATCH * tokens for found in cached]
        if any(has_affinity) and not all(has_affinity):
            waits = [worker.new_tokens / LLM_D_RATE for worker in workers]
            near = min(wait for wait, has in zip(waits, has_affinity, strict=True) if has)
            far = min(wait for wait, has in zip(waits, has_affinity, strict=True) if not has)
            if near - far > LLM_D_GATE_S:
                has_affinity = []
        is_open = has_affinity if any(has_affinity) else [True] * len(workers)
        return self.least(
            [
                worker.new_tokens + tokens - found if may else math.inf
                for worker, found, may in zip(workers, cached, is_open, strict=True)
            ]
        )


class Dynamo(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        pairs = zip(workers, cached, strict=True)
        return self.least([max(0, worker.new_tokens + tokens - found) for worker, found in pairs])


class LMetric(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        pairs = zip(workers, cached, strict=True)
        return self.least(
            [(worker.new_tokens + tokens - found) * (worker.requests + 1) for worker, found in pairs]
        )


class Conductor(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        now, pairs = self.now(), zip(workers, cached, strict=True)
        return self.least([worker.wait_s(now) + seconds(tokens, found) for worker, found in pairs])


class Aibrix(Formula):
    def chosen(self, workers: Sequence[Worker], cached: Sequence[int], tokens: int) -> int:
        loads = [worker.requests for worker in workers]
        if max(loads) - min(loads) > AIBRIX_SPREAD:
            return self.least(loads)
        limit = statistics.fmean(loads) + statistics.pstdev(loads)
        order = sorted(range(len(workers)), key=lambda index: (-cached[index], loads[index]))
        for index in order:
            if cached[index] and loads[index] <= limit:
                return index
        return self.least(loads)


FORMULAS: Final[dict[str, type[Formula]]] = {
    "smg": Smg,
    "llm_d": LlmD,
    "dynamo": Dynamo,
    "lmetric": LMetric,
    "conductor": Conductor,
    "aibrix": Aibrix,
}


def enter() -> None:
    """Enter the formulas into the table of policies, of this process alone."""
    for name, formula in FORMULAS.items():
        POLICIES[name] = PolicySpec(name, formula, "Another router chooses by this formula.")
