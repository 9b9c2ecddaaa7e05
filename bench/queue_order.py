"""This measures what the order of the queue does to how long requests wait for a seat, in virtual time.

    python -m bench.queue_order TRACE [--load 1.0] [--seats 64] [--seeds 5]

TRACE is in Mooncake's form: lines of JSON with `input_length` and `output_length`. The gate is the real one.
Requests come at random, at `--load` times what the seats can serve; each holds its seat for its prefill and
for its answer, as on a 70B-class model on eight H100. What clients say of their answers is varied: nothing; a
limit of one to four times what comes; the same 4096 tokens for all.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import statistics
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from bench.shared.command import parser, positive
from orchestrator.config.options import QueueConfig
from orchestrator.errors import BatonError
from orchestrator.relay.admission import Gate
from orchestrator.relay.turns import STEP_S, work_s
from orchestrator.relay.waiting import Demand
from orchestrator.routing.policies.prefix_legs import seconds
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.telemetry.record import RequestRecord

USUAL_ANSWER = 256  # as `relay/flow.py` has it
DEADLINE_S = 600.0
MOST_ROWS = 6000

Row = tuple[int, int]  # tokens of a prompt and of its answer
Limit = Callable[[int, Random], int]
LIMITS: dict[str, Limit] = {
    "no limits": lambda answer, random: USUAL_ANSWER,
    "limits of 1 to 4 times": lambda answer, random: int(answer * random.uniform(1, 4)),
    "limits of 4096": lambda answer, random: 4096,
}


class Site:
    """A gate whose clock jumps from event to event."""

    def __init__(self, order: str, seats: int) -> None:
        self.now = 0.0
        self.gate = Gate("m", 0, QueueConfig.model_validate({"order": order}), _telemetry(), lambda: self.now)
        self.gate.resize(seats)
        self.waits: list[float] = []
        self.refused = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, moment: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), what))

    async def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
            for _ in range(3):
                await asyncio.sleep(0)
            self.gate.sweep()

    async def serve(self, row: Row, limit: int) -> None:
        came = self.now
        try:
            if self.gate.free > 0:
                self.gate.free -= 1
            else:
                work = work_s(row[0], row[0], limit)
                await self.gate.wait(Demand(row[0], row[0] * 4, came + DEADLINE_S, is_stream=True, work=work))
        except BatonError:
            self.refused += 1
            return
        self.waits.append(self.now - came)
        record = RequestRecord("", "", came)
        record.admitted, record.is_stream = self.now, True
        record.first_byte = self.now + seconds(row[0], 0.0)
        self.at(self.now + held_s(row), partial(self.gate.give_back, record))


def held_s(row: Row) -> float:
    return seconds(row[0], 0.0) + row[1] * STEP_S


def _telemetry() -> Telemetry:
    return Telemetry(Layout(["m"], []))


async def measure(
    rows: Sequence[Row], order: str, limit: Limit, seats: int, load: float, seed: int
) -> tuple[float, float, float]:
    """Return the median wait, that of 99 of 100, and the share of those that were sent away."""
    random, site, moment = Random(seed), Site(order, seats), 0.0
    mean_s = statistics.fmean(map(held_s, rows)) / seats / load
    tasks: list[asyncio.Task[None]] = []
    for row in rows:
        moment += random.expovariate(1 / mean_s)
        serve = partial(site.serve, row, limit(row[1], random))
        site.at(moment, partial(_begin, tasks, serve))
    await site.run()
    waits = sorted(site.waits)
    return waits[len(waits) // 2], waits[len(waits) * 99 // 100], site.refused / len(rows)


def _begin(tasks: list[asyncio.Task[None]], serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
    tasks.append(asyncio.create_task(serve()))


def read(path: Path) -> Iterator[Row]:
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            yield row["input_length"], row["output_length"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("trace", type=Path)
    options.add_argument("--load", type=float, default=1.0)
    options.add_argument("--seats", type=positive, default=64)
    options.add_argument("--seeds", type=positive, default=5)
    given = options.parse_args()
    rows = list(read(given.trace))[:MOST_ROWS]
    print(f"{'limits':24}{'order':10}{'p50 s':>16}{'p99 s':>16}{'sent away':>16}")
    for name, limit in LIMITS.items():
        for order in ("fifo", "shortest"):
            runs = [
                asyncio.run(measure(rows, order, limit, given.seats, given.load, seed))
                for seed in range(given.seeds)
            ]
            cells = "".join(f"{_spread(values):>16}" for values in zip(*runs, strict=True))
            print(f"{name:24}{order:10}{cells}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} +- {statistics.pstdev(values):.2f}"


if __name__ == "__main__":
    main()
