"""A simulated engine computes prompts one after the other, and decodes all that are running together.

Its times are those of the latency model (`worker/sim/latency.py`). No decode step is an event of its own:
between two changes of the batch a step takes `base + slope * steps` seconds, as the KV caches grow, so what
has been decoded at a moment follows from a square root. An event costs O(log n) of what runs here.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Final, Protocol

from launch.simulate.cache import PrefixCache
from launch.simulate.heap import VirtualClock
from launch.simulate.trace import Arrival
from worker.sim.latency import Latency

CHUNK_TOKENS: Final = 2048  # of a prompt between two decode steps: vLLM's max_num_batched_tokens, by default
CLOSE: Final = 1e-7  # tokens, seconds: rounding must not make an event of its own


class EngineModel:
    """An engine is of this kind."""

    __slots__ = ("kv_tokens", "latency", "seats")

    def __init__(self, latency: Latency, kv_tokens: int, seats: int) -> None:
        """So many tokens fit into its KV cache; it decodes for at most `seats` requests at once."""
        self.latency = latency
        self.kv_tokens = kv_tokens
        self.seats = seats


class Job(Protocol):
    """An engine knows this of a request, and notes there what became of it."""

    arrival: Arrival
    cached_tokens: int  # of the prompt, found where it was computed
    computed_s: float  # what that took
    first_at: float  # when the first token of the answer was made


Told = Callable[[Any], None]


class Engine:
    """It tells `on_prefilled` of prompts that are computed for others, `on_begun` of first tokens, and
    `on_ended` of whole answers.
    """

    def __init__(
        self,
        model: EngineModel,
        block_tokens: int,
        clock: VirtualClock,
        random: Random,
        *,
        on_prefilled: Told,
        on_begun: Told,
        on_ended: Told,
        noise: float = 0.0,
        slowness: float = 1.0,
    ) -> None:
        """The logarithm of a prefill's duration has the standard deviation `noise`. All takes `slowness`
        times as long as the model says.
        """
        self.cache = PrefixCache(max(1, model.kv_tokens // block_tokens))
        self.busy_s = 0.0  # with prompts
        self._model = model
        self._latency = model.latency
        self._kv_growth_s = model.latency.step_s(1, 1) - model.latency.step_s(1, 0)  # per token
        self._block_tokens = block_tokens
        self._clock = clock
        self._random = random
        self._on_prefilled = on_prefilled
        self._on_begun = on_begun
        self._on_ended = on_ended
        self._noise = noise
        self._slowness = slowness
        self._prompts: deque[tuple[Any, bool]] = deque()  # to be computed; whether the answer is made here
        self._prompt: tuple[Any, bool] | None = None  # that is computed now
        self._left_s = 0.0  # of it
        self._chunk_s = 0.0  # of it, between two steps
        self._received: deque[Any] = deque()  # have their KV caches, and wait for a place in the batch
        self._link_free_at = 0.0
        self._batch: list[tuple[float, int, Any]] = []  # a heap, by the step after which each ends
        self._kv_tokens = 0.0  # of the batch
        self._steps = 0.0  # since the batch was last empty
        self._at = clock.now  # the moment that all this is of
        self._version = 0  # of the next event

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is computed or waits, and no KV cache is held."""
        has_work = self._prompt is not None or self._prompts or self._received or self._batch
        return not has_work and self._kv_tokens == 0.0

    # --- what it is asked for -------------------------------------------------------------------

    def prefill(self, job: Job, *, is_whole: bool) -> None:
        """Compute the prompt when it is its turn; make the answer, too, if `is_whole`."""
        self._advance()
        self._prompts.append((job, is_whole))
        self._go_on()

    def receive(self, job: Job, factor: float = 1.0) -> None:
        """Take the KV cache over as soon as the link is free, and make the answer. What is in the prefix
        cache need not come. The transfer takes `factor` times as long as the model says.
        """
        arrival = job.arrival
        missing = arrival.prompt_tokens - self._cached(arrival)
        begun = max(self._clock.now, self._link_free_at)
        self._link_free_at = begun + self._latency.transfer_s(missing) * factor
        self._clock.at(self._link_free_at, self._land, job)

    # --- time -----------------------------------------------------------------------------------

    def _tick(self, version: int) -> None:
        if version == self._version:
            self._advance()
            self._go_on()

    def _advance(self) -> None:
        """Bring all to the present."""
        elapsed, self._at = self._clock.now - self._at, self._clock.now
        if not self._batch:
            self._left_s -= elapsed
            return
        steps = self._steps_in(elapsed)
        self._steps += steps
        self._kv_tokens += len(self._batch) * steps
        self._left_s -= steps * self._chunk_s

    def _steps_in(self, elapsed: float) -> float:
        base, slope = self._step()
        if slope > 0.0:
            return (math.sqrt(base * base + 2.0 * slope * elapsed) - base) / slope
        return elapsed / base if base > 0.0 else self._batch[0][0] - self._steps

    def _step(self) -> tuple[float, float]:
        """Return how long a step takes now, and how much longer each one is than the one before."""
        running = len(self._batch)
        base = self._latency.step_s(running, self._kv_tokens) * self._slowness
        if self._prompt is not None:
            base += self._chunk_s
        return base, running * self._kv_growth_s * self._slowness

    def _go_on(self) -> None:
        """End what is complete, begin what can begin, and say when to look again."""
        while True:
            self._end_answers()
            if self._prompt is not None and self._left_s <= CLOSE:
                self._end_prompt()
            if self._prompt is not None or not self._prompts:
                break
            self._begin_prompt()
        self._admit()
        self._version += 1
        moment = self._next_moment()
        if moment < math.inf:
            self._clock.at(moment, self._tick, self._version)

    def _next_moment(self) -> float:
        if not self._batch:
            return math.inf if self._prompt is None else self._at + self._left_s
        steps = self._batch[0][0] - self._steps
        if self._prompt is not None and self._chunk_s > 0.0:
            steps = min(steps, self._left_s / self._chunk_s)
        base, slope = self._step()
        return self._at + base * steps + slope * steps * steps / 2.0

    # --- prompts --------------------------------------------------------------------------------

    def _cached(self, arrival: Arrival) -> int:
        """Return how many of a prompt's tokens are in the prefix cache; its last one never counts."""
        found = self.cache.matched(arrival.blocks) * self._block_tokens
        return min(found, arrival.prompt_tokens - 1)

    def _begin_prompt(self) -> None:
        self._prompt = job, _ = self._prompts.popleft()
        arrival = job.arrival
        cached = job.cached_tokens = self._cached(arrival)
        self.cache.put(arrival.blocks[: cached // self._block_tokens])
        seconds = self._latency.prefill_s(arrival.prompt_tokens, cached) * self._slowness
        if self._noise:
            seconds *= math.exp(self._random.gauss(0.0, self._noise))
        self.busy_s += seconds
        job.computed_s = self._left_s = seconds
        self._chunk_s = seconds / max(1, math.ceil((arrival.prompt_tokens - cached) / CHUNK_TOKENS))

    def _end_prompt(self) -> None:
        assert self._prompt is not None  # noqa: S101  # for the type checker
        (job, is_whole), self._prompt = self._prompt, None
        self.cache.put(job.arrival.blocks)
        if is_whole:
            self._begin_answer(job, 0.0)
            self._join(job, job.arrival.output_tokens - 1)
        else:
            self._on_prefilled(job)

    # --- answers --------------------------------------------------------------------------------

    def _land(self, job: Job) -> None:
        self._advance()
        self._received.append(job)
        self._go_on()

    def _admit(self) -> None:
        """Let those that have their KV caches into the batch, as far as there is room."""
        while self._received and len(self._batch) < self._model.seats:
            job = self._received[0]
            arrival = job.arrival
            if self._batch and self._kv_tokens + arrival.prompt_tokens > self._model.kv_tokens:
                return
            self._received.popleft()
            self.cache.put(arrival.blocks)
            self._join(job, arrival.output_tokens)
            self._begin_answer(job, self._step()[0])

    def _begin_answer(self, job: Job, wait_s: float) -> None:
        job.first_at = self._at + wait_s
        self._clock.at(job.first_at, self._on_begun, job)

    def _join(self, job: Job, tokens: int) -> None:
        """Let a request run for so many tokens more."""
        self._kv_tokens += job.arrival.prompt_tokens + job.arrival.output_tokens - tokens
        heapq.heappush(self._batch, (self._steps + tokens, job.arrival.index, job))

    def _end_answers(self) -> None:
        while self._batch and self._batch[0][0] <= self._steps + CLOSE:
            _, _, job = heapq.heappop(self._batch)
            if self._batch:
                self._kv_tokens -= job.arrival.prompt_tokens + job.arrival.output_tokens
            else:
                self._kv_tokens = self._steps = 0.0
            job.first_at = min(job.first_at, self._at)  # all of it was made: it may be early by `CLOSE`
            self._on_ended(job)
