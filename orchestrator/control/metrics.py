"""`/metrics` renders the metrics of the catalog with prometheus-client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

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
from orchestrator.control.readings import READ, READ_HISTOGRAM, Histogram, Moment, Sample
from orchestrator.control.state import ProcessEnd, ProcessStatus
from orchestrator.control.worker_watch import Figures
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry import catalog
from orchestrator.telemetry.catalog import UNKNOWN, Kind
from orchestrator.telemetry.counters import Layout
from orchestrator.telemetry.tenants import KeyCounts
from orchestrator.transport.base import UpstreamStats
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.sources import SourceStatus
from orchestrator.workers.worker import Worker

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


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
    events: Callable[[], Mapping[str, int]] = dict  # how many there were of each kind
    not_after: Callable[[], float | None] = lambda: None  # of the TLS certificate, in seconds since 1970
    keys: Callable[[], Sequence[KeyCounts]] = list
    sources: Callable[[], Sequence[SourceStatus]] = list  # that find workers
    wishes: Callable[[], Sequence[Wish]] = list


class BatonCollector(Collector):
    """The collector turns the sources into metric families."""

    def __init__(self, config: Config, sources: Sources) -> None:
        self._sources = sources
        self._places = config.orchestrator.processes
        self._pools = [(model.name, role) for model in config.models for role, _ in model.pools()]
        self._unknown = unknown_label(sources.layout.models)

    def collect(self) -> Iterator[Metric]:
        moment = self._moment()
        for metric in catalog.METRICS:
            if metric.kind is Kind.INFO:
                info = {name: self._named(value) for name, value in self._sources.info().items()}
                yield InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, value=info)
            elif metric in READ_HISTOGRAM:
                yield self._histograms(metric, READ_HISTOGRAM[metric](moment))
            else:
                yield self._samples(metric, READ[metric](moment))

    def _moment(self) -> Moment:
        """Read everything at once: one moment for all families."""
        sources = self._sources
        return Moment(
            layout=sources.layout,
            row=list(sources.counts()),
            pools=self._pools,
            statuses=sources.workers(),
            figures=[(_labels_of(worker), figures) for worker, figures in sources.figures()],
            upstream=sources.upstream(),
            places=self._places,
            processes=sources.processes(),
            process_ends=sources.process_ends(),
            events=sources.events(),
            not_after=sources.not_after(),
            keys=sources.keys(),
            sources=sources.sources(),
            wishes=sources.wishes(),
        )

    def _samples(self, metric: catalog.Metric, samples: Iterable[Sample]) -> Metric:
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=metric.labels)
        for labels, value in samples:
            family.add_metric(list(map(self._named, labels)), float(value))
        return family

    def _histograms(self, metric: catalog.Metric, histograms: Iterable[Histogram]) -> Metric:
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        bounds = (*map(str, metric.bounds), "+Inf")
        for labels, counts, sum_us in histograms:
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric(list(map(self._named, labels)), buckets, sum_value=sum_us / 1e6)
        return family

    def _named(self, value: str) -> str:
        return value or self._unknown


def unknown_label(models: Iterable[str]) -> str:
    """Return what stands for an empty label: a word that is no model's name."""
    taken, word = frozenset(models), UNKNOWN
    while word in taken:
        word = f"_{word}"
    return word


def _labels_of(worker: Worker) -> tuple[str, str, str]:
    return worker.address.model, worker.address.role, worker.name


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
