"""`/metrics` gives names and labels to the numbers of flat rows, rendered with prometheus-client.

All series exist before the first request, and every label comes from the config or from a fixed list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from orchestrator.config.options import Config
from orchestrator.control.state import ProcessEnd, ProcessStatus
from orchestrator.control.worker_watch import Figures
from orchestrator.telemetry.counters import (
    LAG_BOUNDS,
    QUEUE_UNITS,
    STAGE_BOUNDS,
    STAGES,
    FallbackReason,
    HandoffTrouble,
    Layout,
    LeaseState,
    RejectReason,
    RetryReason,
    histogram_cells,
)
from orchestrator.telemetry.figures import BOUNDS, FIRST_BYTE, GAP
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.usage import Kv
from orchestrator.workers.figures import COUNTERS, CacheFigures
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker

KV_EVENT_COUNTS = [CacheFigures._fields[place] for place in COUNTERS]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Sources:
    """The collector looks here at the time of each rendering. `counts` gives one row or a sum of rows."""

    layout: Layout
    counts: Callable[[], Sequence[int]]
    workers: Callable[[], Sequence[WorkerStatus]]
    upstream: Callable[[], UpstreamStats]
    processes: Callable[[], Sequence[ProcessStatus]]
    process_ends: Callable[[], Mapping[ProcessEnd, int]]
    info: Callable[[], Mapping[str, str]]
    figures: Callable[[], Sequence[tuple[Worker, Figures]]] = lambda: ()


class BatonCollector(Collector):
    """The collector turns the sources into metric families."""

    def __init__(self, config: Config, sources: Sources) -> None:
        self._sources = sources
        self._layout = sources.layout
        self._processes = config.orchestrator.processes
        self._pools = [
            (model.name, role)
            for model in config.models
            for role in ("prefill", "decode", "both")
            if getattr(model, role) is not None
        ]

    def collect(self) -> Iterator[Metric]:
        row = list(self._sources.counts())  # one moment for all families
        yield self._info()
        yield self._requests(row)
        yield self._in_flight(row)
        yield self._stages(row)
        yield self._errors(row)
        yield self._kv_transfers(row)
        yield self._fallbacks(row)
        yield self._retries(row)
        yield from self._queues(row)
        yield self._rejections(row)
        yield self._poison(row)
        yield self._handoffs(row)
        yield from self._leases(row)
        yield self._leaked_leases(row)
        yield self._loop_lag(row)
        yield self._log_lost(row)
        statuses = self._sources.workers()
        yield self._workers(statuses)
        yield self._worker_in_flight(statuses)
        yield from self._caches(statuses)
        yield from self._kv_events(statuses)
        yield from self._worker_figures(self._sources.figures())
        yield from self._upstream(self._sources.upstream())
        yield self._process_in_flight(self._sources.processes())
        yield self._process_ends(self._sources.process_ends())

    def _info(self) -> Metric:
        return InfoMetricFamily("baton", "What runs here.", value=dict(self._sources.info()))

    def _requests(self, row: list[int]) -> Metric:
        layout = self._layout
        family = CounterMetricFamily(
            "baton_requests", "Requests that ended, by HTTP status.", labels=("model", "endpoint", "code")
        )
        labels = product(layout.models, layout.endpoints, layout.statuses)
        for cell, names in enumerate(labels, layout.requests):
            family.add_metric(names, row[cell])
        return family

    def _in_flight(self, row: list[int]) -> Metric:
        family = GaugeMetricFamily(
            "baton_requests_in_flight", "Requests that have not ended.", labels=("model",)
        )
        for cell, model in enumerate(self._layout.models, self._layout.in_flight):
            family.add_metric((model,), row[cell])
        return family

    def _stages(self, row: list[int]) -> Metric:
        family = HistogramMetricFamily(
            "baton_request_stage_seconds",
            "Time per stage: queue, prefill, decode to the first byte of the answer, total.",
            labels=("model", "stage"),
        )
        pairs = product(enumerate(self._layout.models), enumerate(STAGES))
        for (model_index, model), (stage_index, stage) in pairs:
            cell = self._layout.stage_cell(model_index, stage_index)
            _add_histogram(family, (model, stage), row, cell, STAGE_BOUNDS)
        return family

    def _errors(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_errors",
            "Requests that ended in an error, by its code; also streams that failed after a 200.",
            labels=("code",),
        )
        return _add_row(family, row, self._layout.errors, self._layout.error_codes)

    def _kv_transfers(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_kv_transfers", "Answered requests, by what became of the KV cache.", labels=("outcome",)
        )
        outcomes = [kv.name.lower() for kv in Kv if kv is not Kv.NONE]
        return _add_row(family, row, self._layout.kv + 1, outcomes)

    def _fallbacks(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_transport_fallbacks",
            "Bodies sent as JSON although msgpack was asked for.",
            labels=("reason",),
        )
        return _add_row(family, row, self._layout.fallbacks, [r.name.lower() for r in FallbackReason])

    def _retries(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_upstream_retries", "Work sent to a worker again after a failure.", labels=("reason",)
        )
        return _add_row(family, row, self._layout.retries, [r.name.lower() for r in RetryReason])

    def _queues(self, row: list[int]) -> Iterator[Metric]:
        layout = self._layout
        for place, unit in enumerate(QUEUE_UNITS):
            family = GaugeMetricFamily(
                f"baton_queue_{unit}",
                f"What waits for a seat on a decode worker, in {unit}.",
                labels=("model",),
            )
            for index, model in enumerate(layout.models[:-1]):
                family.add_metric((model,), row[layout.queue_cell(index) + place])
            yield family
        yield GaugeMetricFamily(
            "baton_held_bytes", "Of open requests, and of answers not yet sent.", value=row[layout.held_bytes]
        )

    def _rejections(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_requests_rejected", "Requests sent away before any work on them.", labels=("reason",)
        )
        return _add_row(family, row, self._layout.rejections, [r.name.lower() for r in RejectReason])

    def _poison(self, row: list[int]) -> Metric:
        return CounterMetricFamily(
            "baton_poison_requests",
            "Requests that were not sent on, as workers were lost with them.",
            value=row[self._layout.poison],
        )

    def _handoffs(self, row: list[int]) -> Metric:
        family = CounterMetricFamily(
            "baton_handoffs_given_up",
            "Hand-offs that a decode worker had for too long without an answer; prefill runs again.",
            labels=("reason",),
        )
        return _add_row(family, row, self._layout.handoffs, [t.name.lower() for t in HandoffTrouble])

    def _leases(self, row: list[int]) -> Iterator[Metric]:
        layout = self._layout
        open_leases = GaugeMetricFamily(
            "baton_kv_leases",
            "Finished prefills that pin KV blocks: for a leg to come, or for one that has not answered yet.",
            labels=("state",),
        )
        ended = CounterMetricFamily(
            "baton_kv_leases_ended", "Finished prefills by how their KV blocks got free.", labels=("state",)
        )
        for state in LeaseState:
            family = open_leases if state < LeaseState.CONSUMED else ended
            family.add_metric((state.name.lower(),), row[layout.leases + state])
        yield from (open_leases, ended)

    def _leaked_leases(self, row: list[int]) -> Metric:
        return CounterMetricFamily(
            "baton_kv_leases_leaked",
            "Finished prefills that nobody looked after any more. Stays 0.",
            value=row[self._layout.leases_leaked],
        )

    def _log_lost(self, row: list[int]) -> Metric:
        return CounterMetricFamily(
            "baton_log_lines_lost",
            "Lines of the log that were not written: the disk was full, or nobody read them.",
            value=row[self._layout.log_lost],
        )

    def _loop_lag(self, row: list[int]) -> Metric:
        family = HistogramMetricFamily(
            "baton_event_loop_lag_seconds", "How late the event loop calls what is due.", labels=()
        )
        _add_histogram(family, (), row, self._layout.lag, LAG_BOUNDS)
        return family

    def _workers(self, statuses: Sequence[WorkerStatus]) -> Metric:
        family = GaugeMetricFamily("baton_workers", "Workers, by state.", labels=("model", "role", "state"))
        added = ((status.address.model, status.address.role) for status in statuses)
        for (model, role), state in product(dict.fromkeys((*self._pools, *added)), WorkerState):
            family.add_metric(
                (model, role, state),
                sum((w.address.model, w.address.role, w.state) == (model, role, state) for w in statuses),
            )
        return family

    def _worker_in_flight(self, statuses: Sequence[WorkerStatus]) -> Metric:
        family = GaugeMetricFamily(
            "baton_worker_in_flight", "Legs that a worker is serving.", labels=("worker",)
        )
        for status in statuses:
            family.add_metric((status.address.name,), status.in_flight)
        return family

    def _caches(self, statuses: Sequence[WorkerStatus]) -> Iterator[Metric]:
        labels = ("worker",)
        error = GaugeMetricFamily(
            "baton_prefix_prediction_error",
            "How far off the predicted number of cached tokens was of late: its mean absolute error, by the "
            "prompts' tokens.",
            labels=labels,
        )
        missed = GaugeMetricFamily(
            "baton_prefix_missed_ratio",
            "Share of the tokens predicted to be cached that were not, of late.",
            labels=labels,
        )
        trusted = GaugeMetricFamily(
            "baton_prefix_trusted", "1 if routing goes by what the worker should have cached.", labels=labels
        )
        for status in statuses:
            if (cache := status.cache) is not None:
                error.add_metric((status.address.name,), cache.prediction_error)
                missed.add_metric((status.address.name,), cache.missed_ratio)
                trusted.add_metric((status.address.name,), int(cache.is_trusted))
        yield from (error, missed, trusted)

    def _kv_events(self, statuses: Sequence[WorkerStatus]) -> Iterator[Metric]:
        followed = GaugeMetricFamily(
            "baton_kv_events_followed",
            "1 if all KV events of the worker are known, 0 if routing goes by what was sent to it.",
            labels=("worker",),
        )
        counted = CounterMetricFamily(
            "baton_kv_events",
            "Batches of KV events, and what was wrong with them, over all processes.",
            labels=("worker", "what"),
        )
        for status in statuses:
            events = None if status.cache is None else status.cache.kv_events
            if events is not None:
                followed.add_metric((status.address.name,), int(events.state == "followed"))
                for what in KV_EVENT_COUNTS:
                    counted.add_metric((status.address.name, what), getattr(events, what))
        yield from (followed, counted)

    def _worker_figures(self, found: Sequence[tuple[Worker, Figures]]) -> Iterator[Metric]:
        known = [(_names_of(worker), figures) for worker, figures in found]
        for name, what, counted in _COUNTERS:
            yield _per_worker(CounterMetricFamily, f"baton_worker_{name}", what, known, counted)
        for name, what, value in _GAUGES:
            yield _per_worker(GaugeMetricFamily, f"baton_worker_{name}", what, known, value)
        for name, what, histogram in (
            ("first_byte", "Time to a worker's first byte; of a prefill worker, to its answer.", FIRST_BYTE),
            ("inter_token", "Time between two pieces of a worker's streams, as the mean of each.", GAP),
        ):
            family = HistogramMetricFamily(f"baton_worker_{name}_seconds", what, labels=_WORKER_LABELS)
            for names, figures in known:
                _add_histogram(family, names, list(figures.cells), histogram, BOUNDS)
            yield family

    def _upstream(self, stats: UpstreamStats) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "baton_upstream_connections", "Open connections to workers.", labels=("state",)
        )
        family.add_metric(("idle",), stats.idle)
        family.add_metric(("busy",), stats.busy)
        yield family
        for name, what, value in (
            ("connects", "Connections opened to workers.", stats.connects),
            ("reuses", "Legs that started on an idle connection.", stats.reuses),
            ("reconnects", "Legs sent again, as a reused connection was closed.", stats.retries),
        ):
            yield CounterMetricFamily(f"baton_upstream_{name}", what, value=value)

    def _process_in_flight(self, processes: Sequence[ProcessStatus]) -> Metric:
        family = GaugeMetricFamily(
            "baton_process_requests_in_flight",
            "Requests that a data-plane process is serving.",
            labels=("process",),
        )
        for index in range(self._processes):
            in_flight = sum(process.in_flight for process in processes if process.index == index)
            family.add_metric((str(index),), in_flight)
        return family

    def _process_ends(self, ends: Mapping[ProcessEnd, int]) -> Metric:
        family = CounterMetricFamily(
            "baton_process_ends", "Data-plane processes that another one replaced.", labels=("reason",)
        )
        for reason in ProcessEnd:
            family.add_metric((reason,), ends.get(reason, 0))
        return family


_WORKER_LABELS = ("model", "role", "worker")
_COUNTERS: Sequence[tuple[str, str, Callable[[Figures], float | None]]] = (
    ("requests", "Requests in which a worker had its part to the end.", lambda f: f.served),
    ("errors", "Requests that a worker failed.", lambda f: f.errors),
    ("retries", "Requests that a worker failed and another attempt followed.", lambda f: f.retries),
    ("transfers", "Hand-offs that a worker gave or took over.", lambda f: f.transfers),
)
_GAUGES: Sequence[tuple[str, str, Callable[[Figures], float | None]]] = (
    ("seats", "Requests that a worker serves at once.", lambda f: f.seats),
    ("share", "Part of its usual load that a worker takes now: below 1 in slow start.", lambda f: f.share),
    ("state_since_seconds", "When a worker came to its state, as seconds since 1970.", lambda f: f.since),
    ("slow", "Whether a worker is far slower than its peers.", lambda f: f.is_slow),
    ("rate", "Requests per second, of the last half minute.", lambda f: f.rate),
    ("first_byte_p50_seconds", "Median of the last half minute.", lambda f: f.first_byte_p50),
    ("first_byte_p99_seconds", "99th percentile of the last half minute.", lambda f: f.first_byte_p99),
    ("inter_token_p50_seconds", "Median of the last half minute.", lambda f: f.inter_token_p50),
    ("inter_token_p99_seconds", "99th percentile of the last half minute.", lambda f: f.inter_token_p99),
)


def _names_of(worker: Worker) -> tuple[str, str, str]:
    return worker.address.model, worker.address.role, worker.name


def _per_worker(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    what: str,
    known: Sequence[tuple[tuple[str, str, str], Figures]],
    value: Callable[[Figures], float | None],
) -> Metric:
    family = kind(name, what, labels=_WORKER_LABELS)
    for names, figures in known:
        number = value(figures)
        if number is not None:
            family.add_metric(names, float(number))
    return family


def _add_row(family: CounterMetricFamily, row: list[int], first: int, names: Iterable[str]) -> Metric:
    for cell, name in enumerate(names, first):
        family.add_metric((name,), row[cell])
    return family


def _add_histogram(
    family: HistogramMetricFamily, labels: Sequence[str], row: list[int], cell: int, bounds: Sequence[float]
) -> None:
    last = cell + histogram_cells(bounds) - 1
    names = (*map(str, bounds), "+Inf")
    family.add_metric(
        labels, list(zip(names, accumulate(row[cell:last]), strict=True)), sum_value=row[last] / 1e6
    )


async def render(collectors: Iterable[Collector]) -> bytes:
    """Return the text format, made a family per turn of the event loop: all at once would stall requests."""
    parts: list[bytes] = []
    for collector in collectors:
        for family in collector.collect():
            parts.append(generate_latest(_OneFamily(family)))
            await asyncio.sleep(0)
    return b"".join(parts)


class _OneFamily(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def process_collector() -> Collector:
    """Return what collects memory, CPU seconds, file descriptors and start time of this process.

    It collects nothing outside Linux.
    """
    return ProcessCollector(registry=None)
