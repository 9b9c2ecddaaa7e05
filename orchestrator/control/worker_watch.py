"""A watch knows how each worker has fared of late, and notices one that is far slower than its peers."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.config.options import DEFAULT_SEATS, Config
from orchestrator.control.scaling_watch import ScalingWatch
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.figures import (
    ERRORS,
    FIRST_BYTE,
    GAP,
    RETRIES,
    SERVED,
    TRANSFERS,
    buckets,
    quantile,
)
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import Event, WorkerState
from orchestrator.workers.worker import Worker

LOOK_S: Final = 2.0
WINDOW_S: Final = 30.0  # figures are of so long
LEAST: Final = 5  # observations in the window: fewer say nothing of a worker
SLOW: Final = 4.0  # so many times the median of its peers is an outlier
OVER: Final = 2.0  # below so many times it is none any more
LEAST_S: Final = 0.002  # a difference below this harms nobody, and may be chance
LOOKS: Final = 2  # in a row until an outlier is told

Cells = Sequence[int]
_MEASURES: Final[Mapping[int, str]] = {FIRST_BYTE: "first byte", GAP: "inter-token time"}
_log = logging.getLogger("baton.workers")


@dataclass(frozen=True, slots=True)
class Figures:
    """These are the figures of one worker. Counts are since it was added; the others are of the last seconds.

    Times are in seconds; None where too little was seen.
    """

    since: float  # when it came to its state, by `time.time()`
    seats: int | None  # requests that it serves at once; None for prefill workers, which have no bound
    share: float  # of its usual part, that it takes now: less than 1 in slow start
    served: int
    errors: int
    retries: int  # errors that another attempt followed
    transfers: int  # hand-offs given or taken over
    restarts: int  # times that it came back after nobody had listened there
    ejections: int  # times that it was taken out on suspicion
    rate: float  # requests per second
    first_byte_p50: float | None
    first_byte_p99: float | None
    inter_token_p50: float | None
    inter_token_p99: float | None
    is_slow: bool  # an outlier among its peers
    cells: Cells  # all that was counted, see `telemetry/figures.py`


class WorkerWatch:
    """A watch looks at all workers every `LOOK_S` seconds; it belongs to the process that probes them."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        cells_of: Callable[[int], Cells],
        events: Events,
        scaling: ScalingWatch | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cells_of` returns what was counted for a slot, by all processes. `scaling` looks beside it."""
        self._scaling = scaling
        self._registry = registry
        self._cells_of = cells_of
        self._events = events
        self._clock = clock
        self._seats = {(m.name, role): pool.seats for m in config.models for role, pool in m.pools()}
        self._since: dict[Worker, float] = {}
        self._began = time.time()
        self._first: dict[Worker, Cells] = {}  # what was counted in its slot before it came
        self._looks: dict[Worker, deque[tuple[float, Cells]]] = {}
        self._suspicious: dict[Worker, int] = {}  # looks in a row
        self._slow: set[Worker] = set()
        self._gone: set[Worker] = set()
        self._restarts: Counter[Worker] = Counter()
        self._ejections: Counter[Worker] = Counter()
        self._kept: set[Worker] = set()  # that would be ejected, if half of their pool were not out
        registry.news.moved.add(self._note_move)
        registry.news.added.add(self._note_added)
        registry.news.removed.add(self._forget)

    async def run(self) -> None:
        """Look until cancelled."""
        await asyncio.gather(self._run(), *(() if self._scaling is None else (self._scaling.run(),)))

    def reconfigure(self, config: Config) -> None:
        """Go by this config from now on."""
        if self._scaling is not None:
            self._scaling.reconfigure(config)

    def wishes(self) -> Sequence[Wish]:
        """Return how many workers are wanted of each role; nothing where nobody counts that."""
        return () if self._scaling is None else self._scaling.wishes()

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Note what was counted so far, and judge who is slow."""
        now = self._clock()
        for worker in self._registry.workers:
            looks = self._looks.setdefault(worker, deque())
            looks.append((now, tuple(self._cells_of(worker.slot))))
            while looks[0][0] < now - WINDOW_S and len(looks) > 1:
                looks.popleft()
        if self._registry.health.slow_outlier != "off":
            self._judge()
        else:
            self._slow.clear()
            self._suspicious.clear()

    def figures(self, worker: Worker) -> Figures:
        cells, lately, seconds = self._counted(worker), *self._window(worker)
        address = worker.address
        first, gap = buckets(lately, FIRST_BYTE), buckets(lately, GAP)
        pools = self._registry.pools[address.model]
        is_seated = address.role != "prefill"
        return Figures(
            since=self._since.get(worker, self._began),
            seats=self._seats.get((address.model, address.role), DEFAULT_SEATS) if is_seated else None,
            share=pools.share(worker),
            served=cells[SERVED],
            errors=cells[ERRORS],
            retries=cells[RETRIES],
            transfers=cells[TRANSFERS],
            restarts=self._restarts[worker],
            ejections=self._ejections[worker],
            rate=lately[SERVED] / seconds if seconds else 0.0,
            first_byte_p50=quantile(first, 0.5),
            first_byte_p99=quantile(first, 0.99),
            inter_token_p50=quantile(gap, 0.5),
            inter_token_p99=quantile(gap, 0.99),
            is_slow=worker in self._slow,
            cells=cells,
        )

    # --- what was counted -----------------------------------------------------------------------

    def _counted(self, worker: Worker) -> Cells:
        return _less(self._cells_of(worker.slot), self._first.get(worker))

    def _window(self, worker: Worker) -> tuple[Cells, float]:
        """Return what was counted in the window, and how long that is."""
        looks = self._looks.get(worker)
        if not looks:
            return self._counted(worker), 0.0
        began, before = looks[0]
        return _less(self._cells_of(worker.slot), before), self._clock() - began

    def _note_move(self, worker: Worker, event: Event) -> None:
        self._since[worker] = time.time()
        if worker.state is WorkerState.GONE:
            self._gone.add(worker)
        elif worker in self._gone:
            self._gone.discard(worker)
            self._restarts[worker] += 1
        if worker.state is WorkerState.EJECTED:
            self._ejections[worker] += 1

    def _note_added(self, worker: Worker) -> None:
        self._since[worker] = time.time()
        self._first[worker] = tuple(self._cells_of(worker.slot))

    def _forget(self, worker: Worker) -> None:
        counted = (self._restarts, self._ejections)
        for known in (self._since, self._first, self._looks, self._suspicious, *counted):
            known.pop(worker, None)
        for some in (self._slow, self._kept, self._gone):
            some.discard(worker)

    # --- who is slow ----------------------------------------------------------------------------

    def _judge(self) -> None:
        pools: dict[tuple[str, str], list[Worker]] = {}
        for worker in self._registry.workers:
            pools.setdefault((worker.address.model, worker.address.role), []).append(worker)
        for pool in pools.values():
            if len(pool) > 1:
                self._judge_pool({worker: self._window(worker)[0] for worker in pool})

    def _judge_pool(self, lately: Mapping[Worker, Cells]) -> None:
        medians = {measure: _medians(lately, measure) for measure in _MEASURES}
        for worker in lately:
            found = [
                (_MEASURES[measure], *compared)
                for measure, known in medians.items()
                if (compared := _compared(worker, known)) is not None
            ]
            if found:
                self._note_compared(worker, max(found, key=lambda one: one[1] / one[2]))

    def _note_compared(self, worker: Worker, found: tuple[str, float, float]) -> None:
        """Note how a worker compares with its peers: in what, its median, and theirs."""
        measure, own_s, peers_s = found
        if own_s >= SLOW * peers_s and own_s - peers_s >= LEAST_S:
            self._suspicious[worker] = self._suspicious.get(worker, 0) + 1
            if self._suspicious[worker] >= LOOKS:
                milliseconds = f"{own_s * 1e3:.4g} ms, its peers' {peers_s * 1e3:.4g} ms"
                self._note_slow(worker, f"{measure} p50 {milliseconds}")
        elif own_s < OVER * peers_s or own_s - peers_s < LEAST_S:
            self._suspicious.pop(worker, None)
            self._kept.discard(worker)
            if worker in self._slow:
                self._slow.discard(worker)
                self._tell(
                    worker, "worker.slow_over", f"{worker.name} is as fast as its peers again", logging.INFO
                )

    def _note_slow(self, worker: Worker, why: str) -> None:
        if worker not in self._slow:
            self._slow.add(worker)
            text = f"{worker.name} is far slower than its peers: {why}"
            self._tell(worker, "worker.slow", text, logging.WARNING)
        if self._registry.health.slow_outlier == "eject":
            self._eject(worker, why)

    def _eject(self, worker: Worker, why: str) -> None:
        if self._registry.judge.note_slow(worker, why):
            self._suspicious.pop(worker, None)  # it is judged anew when it is back, by what it does then
            self._looks.pop(worker, None)
            self._kept.discard(worker)
        elif worker not in self._kept:
            self._kept.add(worker)
            text = f"{worker.name} is not ejected: half of its pool is out already"
            self._tell(worker, "worker.slow_kept", text, logging.WARNING)

    def _tell(self, worker: Worker, kind: str, text: str, level: int) -> None:
        _log.log(level, "%s", text)
        self._events.note(kind, text, subject=worker.name)


def _less(cells: Cells, before: Cells | None) -> Cells:
    """Return what was counted since `before`; a process that ended in between may have taken some away."""
    return cells if before is None else [max(0, now - then) for now, then in zip(cells, before, strict=True)]


def _medians(lately: Mapping[Worker, Cells], measure: int) -> dict[Worker, float]:
    """Return the medians of those of which enough is known."""
    found: dict[Worker, float] = {}
    for worker, cells in lately.items():
        counts = buckets(cells, measure)
        median = quantile(counts, 0.5)
        if median is not None and sum(counts) >= LEAST:
            found[worker] = median
    return found


def _compared(worker: Worker, medians: Mapping[Worker, float]) -> tuple[float, float] | None:
    """Return a worker's median and that of its peers; None if nothing is known of either."""
    peers = [median for peer, median in medians.items() if peer is not worker]
    if worker not in medians or not peers:
        return None
    return medians[worker], statistics.median(peers)
