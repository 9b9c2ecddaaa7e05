"""One run: requests of a workload under a load, and the step that they make."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from launch.bench.client import Client
from launch.bench.prompts import Prompts
from launch.bench.results import ClientLoad, Load, Step, Unit, summarize
from launch.bench.sample import Sample, Slo
from launch.bench.schedule import arrivals, keep
from launch.bench.shapes import Workload

# A client of a closed loop that was refused waits, so as not to storm an endpoint that is gone.
_PAUSE_AFTER_ERROR_S = 0.1

Ask = Callable[[int, float], Coroutine[Any, Any, Sample]]


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be measured. Equal runs ask for the same at the same moments."""

    workload: Workload
    load: Load
    duration_s: float
    seed: str


@dataclass(slots=True)
class Tally:
    """A run under way, for whoever shows it."""

    run: Run
    started: float
    sent: int = 0
    failed: int = 0
    samples: list[Sample] = field(default_factory=list)

    def note(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.failed += not sample.is_ok


async def measure(
    client: Client, prompts: Prompts, run: Run, slo: Slo, watch: Callable[[Tally], None] = lambda tally: None
) -> Step:
    """Send, wait for the last answer, and summarize. `watch` gets the tally at the start."""
    tally = Tally(run, time.perf_counter())
    watch(tally)
    connections, cpu = client.upstream.stats(), time.process_time()

    async def ask(index: int, due: float) -> Sample:
        tally.sent += 1
        sample = await client.ask(prompts.body(run.workload, index), due)
        tally.note(sample)
        return sample

    await _LOOPS[run.load.unit](run, ask)
    seconds = max(time.perf_counter() - tally.started, run.duration_s)
    after = client.upstream.stats()
    load = ClientLoad(
        cpu=(time.process_time() - cpu) / seconds,
        connects=after.connects - connections.connects,
        reuses=after.reuses - connections.reuses,
    )
    return summarize(run.workload.name, run.load, tally.samples, seconds, slo, load)


async def _open_loop(run: Run, ask: Ask) -> None:
    """Requests come when the schedule says, whatever became of the ones before."""
    random = Random(run.seed)  # noqa: S311  # a schedule, no secrets
    async with asyncio.TaskGroup() as group:
        await keep(
            arrivals(run.load.value, run.duration_s, random),
            lambda index, due: group.create_task(ask(index, due)),
        )


async def _closed_loop(run: Run, ask: Ask) -> None:
    """So many clients, each of which sends when its last answer is complete."""
    indices, end = count(), time.perf_counter() + run.duration_s

    async def client() -> None:
        while (now := time.perf_counter()) < end:
            sample = await ask(next(indices), now)
            if not sample.is_ok:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(int(run.load.value)):
            group.create_task(client())


_LOOPS = {Unit.RATE: _open_loop, Unit.CONCURRENT: _closed_loop}
