"""One endpoint under test: its client, its model, and the steps that were measured so far."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from launch.bench.client import Client
from launch.bench.errors import BenchError
from launch.bench.measure import Run, measure
from launch.bench.probe import Target
from launch.bench.progress import ProgressLine
from launch.bench.prompts import Corpus, Prompts
from launch.bench.results import Load, Step
from launch.bench.sample import Slo
from launch.bench.shapes import Workload


class Session:
    """Steps of one session never share a prompt, so none is helped by what the one before left in a cache."""

    def __init__(
        self,
        client: Client,
        target: Target,
        corpus: Corpus,
        slo: Slo,
        progress: ProgressLine,
        *,
        seed: str,
        salt: str,
    ) -> None:
        """Seed and salt as `Prompts` has them."""
        self.target = target
        self.steps: list[Step] = []
        self.sustained: dict[str, float] = {}
        self._client = client
        self._corpus = corpus
        self._seed = seed
        self._slo = slo
        self._progress = progress
        self._salts: Iterator[str] = (f"{salt}/{number}" for number in count())
        self._warm: set[str] = set()

    async def step(self, workload: Workload, load: Load, duration_s: float, seed: str | None = None) -> Step:
        """Measure, and keep the step. Raises `BenchError` if the endpoint has gone.

        `seed`, of schedule and lengths, is the session's unless given.
        """
        seed = seed or self._seed
        await self._warm_up(workload)
        prompts = self._prompts(seed)
        step = await measure(
            self._client, prompts, Run(workload, load, duration_s, seed), self._slo, self._progress.watch
        )
        self.steps.append(step)
        if set(step.errors) == {"no connection"} and not step.ok:
            raise BenchError(f"{self._client.endpoint.url} has gone: {step.error_details['no connection']}")
        return step

    async def _warm_up(self, workload: Workload) -> None:
        """One request of each shape that nobody measures; an error will show again where it counts."""
        if workload.name in self._warm:
            return
        self._warm.add(workload.name)
        prompts = self._prompts(self._seed)
        for shape in dict.fromkeys(workload.shapes):
            await self._client.ask(prompts.body(workload, workload.shapes.index(shape)))

    def _prompts(self, seed: str) -> Prompts:
        target = self.target
        return Prompts(
            self._corpus,
            target.model,
            target.options,
            target.tokens_per_word,
            seed=seed,
            salt=next(self._salts),
        )
