"""Readings give each metric of the catalog its series, as they are at one moment.

All series exist before the first request, and every label comes from the config or from a fixed list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from typing import Final

from orchestrator.control.state import ProcessEnd, ProcessStatus
from orchestrator.control.worker_watch import Figures
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry import catalog, counters, tenants
from orchestrator.telemetry.catalog import Metric
from orchestrator.telemetry.counters import Layout, histogram_cells
from orchestrator.telemetry.figures import BOUNDS, FIRST_BYTE, GAP
from orchestrator.telemetry.tenants import KeyCounts
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.usage import Kv
from orchestrator.workers.figures import COUNTERS, CacheFigures, CacheStatus, KvEventStatus
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.sources import SourceStatus
from orchestrator.workers.states import WorkerState

Sample = tuple[Sequence[str], float]  # the values of the labels, and the value
# The values of the labels, how many observations are in each bucket, and the sum of all in microseconds.
Histogram = tuple[Sequence[str], Sequence[int], int]

_RELOADS: Final[Mapping[str, str]] = {"applied": "admin.reload", "refused": "admin.reload_refused"}
_KV_EVENT_COUNTS: Final = [CacheFigures._fields[place] for place in COUNTERS]


@dataclass(frozen=True, slots=True)
class Moment:
    """This is all that metrics are read from."""

    layout: Layout
    row: Sequence[int]  # the sum of all processes' rows
    pools: Sequence[tuple[str, str]]  # model and role of those that the config has
    statuses: Sequence[WorkerStatus]
    figures: Sequence[tuple[Sequence[str], Figures]]  # with the labels of each worker
    upstream: UpstreamStats
    places: int  # for data-plane processes
    processes: Sequence[ProcessStatus]
    process_ends: Mapping[ProcessEnd, int]
    events: Mapping[str, int]  # how many there were of each kind
    not_after: float | None  # of the TLS certificate, in seconds since 1970
    keys: Sequence[KeyCounts]
    sources: Sequence[SourceStatus]  # that find workers
    wishes: Sequence[Wish]  # how many workers are wanted


Read = Callable[[Moment], Iterable[Sample]]
ReadHistogram = Callable[[Moment], Iterable[Histogram]]

# --- what is in the row -------------------------------------------------------------------------


def _cells(first: Callable[[Layout], int], names: Callable[[Layout], Iterable[str]]) -> Read:
    """Read cells that stand one after the other, with the values of the one label that they have."""

    def read(moment: Moment) -> Iterator[Sample]:
        layout = moment.layout
        for cell, name in enumerate(names(layout), first(layout)):
            yield (name,), moment.row[cell]

    return read


def _cell(place: Callable[[Layout], int]) -> Read:
    """Read the only series of a metric without labels."""
    return lambda moment: [((), moment.row[place(moment.layout)])]


def _key_cell(cell: int) -> Read:
    """Read a cell of each API key."""
    return lambda moment: [((name,), cells[cell]) for name, cells in moment.keys]


def _key_rejections(moment: Moment) -> Iterator[Sample]:
    for name, cells in moment.keys:
        for reason in counters.RejectReason:
            yield (name, reason.name.lower()), cells[tenants.REJECTED + reason]


def _names(kind: Iterable[IntEnum]) -> Callable[[Layout], Sequence[str]]:
    names = [member.name.lower() for member in kind]
    return lambda layout: names


def _requests(moment: Moment) -> Iterator[Sample]:
    layout = moment.layout
    labels = product(layout.models, layout.endpoints, layout.statuses)
    for cell, names in enumerate(labels, layout.requests):
        yield names, moment.row[cell]


def _queue(unit: str) -> Read:
    place = counters.QUEUE_UNITS.index(unit)

    def read(moment: Moment) -> Iterator[Sample]:
        layout = moment.layout
        for index, model in enumerate(layout.models[:-1]):
            yield (model,), moment.row[layout.queue_cell(index) + place]

    return read


def _tokens(place: int) -> Read:
    def read(moment: Moment) -> Iterator[Sample]:
        for index, model in enumerate(moment.layout.models):
            yield (model,), moment.row[moment.layout.answer_cell(index) + place]

    return read


def _histogram(names: Sequence[str], row: Sequence[int], cell: int, bounds: Sequence[float]) -> Histogram:
    last = cell + histogram_cells(bounds) - 1
    return names, row[cell:last], row[last]


def _stages(moment: Moment) -> Iterator[Histogram]:
    for index, model in enumerate(moment.layout.models):
        for place, stage in enumerate(counters.STAGES):
            if place != counters.TOTAL:
                cell = moment.layout.stage_cell(index, place)
                yield _histogram((model, stage), moment.row, cell, counters.STAGE_BOUNDS)


def _durations(moment: Moment) -> Iterator[Histogram]:
    for index, model in enumerate(moment.layout.models):
        cell = moment.layout.stage_cell(index, counters.TOTAL)
        yield _histogram((model,), moment.row, cell, counters.STAGE_BOUNDS)


def _answers(place: int, bounds: Sequence[float]) -> ReadHistogram:
    def read(moment: Moment) -> Iterator[Histogram]:
        for index, model in enumerate(moment.layout.models):
            yield _histogram((model,), moment.row, moment.layout.answer_cell(index) + place, bounds)

    return read


def _lag(moment: Moment) -> Iterator[Histogram]:
    yield _histogram((), moment.row, moment.layout.lag, counters.LAG_BOUNDS)


# --- what is known of workers -------------------------------------------------------------------


def _workers(moment: Moment) -> Iterator[Sample]:
    found = [(worker.address.model, worker.address.role, worker.state) for worker in moment.statuses]
    pools = dict.fromkeys((*moment.pools, *((model, role) for model, role, _ in found)))
    for (model, role), state in product(pools, WorkerState):
        yield (model, role, state), found.count((model, role, state))


def _wanted(moment: Moment) -> Iterator[Sample]:
    for wish in moment.wishes:
        yield (wish.model, wish.role), wish.wanted


def _labels_of(worker: WorkerStatus) -> tuple[str, str, str]:
    return worker.address.model, worker.address.role, worker.address.name


def _states(moment: Moment) -> Iterator[Sample]:
    for worker, state in product(moment.statuses, WorkerState):
        yield (*_labels_of(worker), state), worker.state is state


def _in_flight(moment: Moment) -> Iterator[Sample]:
    for worker in moment.statuses:
        yield _labels_of(worker), worker.in_flight


def _caches(value: Callable[[CacheStatus], float]) -> Read:
    def read(moment: Moment) -> Iterator[Sample]:
        for worker in moment.statuses:
            if worker.cache is not None:
                yield _labels_of(worker), value(worker.cache)

    return read


def _event_sources(moment: Moment) -> Iterator[tuple[tuple[str, ...], KvEventStatus]]:
    for worker in moment.statuses:
        if worker.cache is not None and worker.cache.kv_events is not None:
            yield _labels_of(worker), worker.cache.kv_events


def _followed(moment: Moment) -> Iterator[Sample]:
    for labels, events in _event_sources(moment):
        yield labels, events.state == "followed"


def _kv_events(moment: Moment) -> Iterator[Sample]:
    for labels, events in _event_sources(moment):
        for what in _KV_EVENT_COUNTS:
            yield (*labels, what), getattr(events, what)


def _figures(value: Callable[[Figures], float | None]) -> Read:
    def read(moment: Moment) -> Iterator[Sample]:
        for labels, figures in moment.figures:
            number = value(figures)
            if number is not None:
                yield labels, number

    return read


def _times(place: int) -> ReadHistogram:
    def read(moment: Moment) -> Iterator[Histogram]:
        for labels, figures in moment.figures:
            yield _histogram(labels, figures.cells, place, BOUNDS)

    return read


# --- the orchestrator itself --------------------------------------------------------------------


def _process_in_flight(moment: Moment) -> Iterator[Sample]:
    for index in range(moment.places):
        yield (str(index),), sum(each.in_flight for each in moment.processes if each.index == index)


def _process_ends(moment: Moment) -> Iterator[Sample]:
    for reason in ProcessEnd:
        yield (reason,), moment.process_ends.get(reason, 0)


def _connections(moment: Moment) -> Iterator[Sample]:
    yield ("idle",), moment.upstream.idle
    yield ("busy",), moment.upstream.busy


def _upstream(value: Callable[[UpstreamStats], int]) -> Read:
    return lambda moment: [((), value(moment.upstream))]


def _reloads(moment: Moment) -> Iterator[Sample]:
    for outcome, kind in _RELOADS.items():
        yield (outcome,), moment.events.get(kind, 0)


def _discovery_ages(moment: Moment) -> Iterator[Sample]:
    now = time.monotonic()
    for source in moment.sources:
        for model, role in source.pools:
            yield (model, role, source.name), now - source.since


def _certificate(moment: Moment) -> Iterator[Sample]:
    if moment.not_after is not None:
        yield (), moment.not_after


# --- all of them --------------------------------------------------------------------------------

READ: Final[Mapping[Metric, Read]] = {
    catalog.REQUESTS: _requests,
    catalog.REQUESTS_IN_FLIGHT: _cells(lambda layout: layout.in_flight, lambda layout: layout.models),
    catalog.ERRORS: _cells(lambda layout: layout.errors, lambda layout: layout.error_codes),
    catalog.KEY_REQUESTS: _key_cell(tenants.REQUESTS),
    catalog.KEY_TOKENS: _key_cell(tenants.TOKENS),
    catalog.KEY_REJECTED: _key_rejections,
    catalog.KEY_IN_FLIGHT: _key_cell(tenants.OPEN),
    catalog.KEY_QUEUE: _key_cell(tenants.WAITING),
    catalog.REJECTED: _cells(lambda layout: layout.rejections, _names(counters.RejectReason)),
    catalog.POISON: _cell(lambda layout: layout.poison),
    catalog.RETRIES: _cells(lambda layout: layout.retries, _names(counters.RetryReason)),
    catalog.PROMPT_TOKENS: _tokens(counters.PROMPT_TOKENS),
    catalog.GENERATION_TOKENS: _tokens(counters.GENERATION_TOKENS),
    catalog.QUEUE_REQUESTS: _queue("requests"),
    catalog.QUEUE_TOKENS: _queue("tokens"),
    catalog.QUEUE_BYTES: _queue("bytes"),
    catalog.HELD_BYTES: _cell(lambda layout: layout.held_bytes),
    catalog.WORKERS: _workers,
    catalog.WANTED_WORKERS: _wanted,
    catalog.WORKER_STATE: _states,
    catalog.WORKER_STATE_SINCE: _figures(lambda figures: figures.since),
    catalog.WORKER_IN_FLIGHT: _in_flight,
    catalog.WORKER_SEATS: _figures(lambda figures: figures.seats),
    catalog.WORKER_SHARE: _figures(lambda figures: figures.share),
    catalog.WORKER_SLOW: _figures(lambda figures: figures.is_slow),
    catalog.WORKER_REQUESTS: _figures(lambda figures: figures.served),
    catalog.WORKER_ERRORS: _figures(lambda figures: figures.errors),
    catalog.WORKER_RETRIES: _figures(lambda figures: figures.retries),
    catalog.WORKER_RESTARTS: _figures(lambda figures: figures.restarts),
    catalog.WORKER_EJECTIONS: _figures(lambda figures: figures.ejections),
    catalog.WORKER_TRANSFERS: _figures(lambda figures: figures.transfers),
    catalog.WORKER_RATE: _figures(lambda figures: figures.rate),
    catalog.WORKER_FIRST_BYTE_P50: _figures(lambda figures: figures.first_byte_p50),
    catalog.WORKER_FIRST_BYTE_P99: _figures(lambda figures: figures.first_byte_p99),
    catalog.WORKER_INTER_TOKEN_P50: _figures(lambda figures: figures.inter_token_p50),
    catalog.WORKER_INTER_TOKEN_P99: _figures(lambda figures: figures.inter_token_p99),
    catalog.KV_TRANSFERS: _cells(lambda layout: layout.kv + 1, _names(kv for kv in Kv if kv is not Kv.NONE)),
    catalog.KV_LEASES: _cells(lambda layout: layout.leases, _names(counters.OPEN_LEASES)),
    catalog.KV_LEASES_ENDED: _cells(lambda layout: layout.lease_ends, _names(counters.ENDED_LEASES)),
    catalog.KV_LEASES_LEAKED: _cell(lambda layout: layout.leases_leaked),
    catalog.HANDOFFS_GIVEN_UP: _cells(lambda layout: layout.handoffs, _names(counters.HandoffTrouble)),
    catalog.PREFIX_ERROR: _caches(lambda cache: cache.prediction_error),
    catalog.PREFIX_MISSED: _caches(lambda cache: cache.missed_ratio),
    catalog.PREFIX_TRUSTED: _caches(lambda cache: cache.is_trusted),
    catalog.KV_EVENTS_FOLLOWED: _followed,
    catalog.KV_EVENTS: _kv_events,
    catalog.LOG_LOST: _cell(lambda layout: layout.log_lost),
    catalog.PROCESS_IN_FLIGHT: _process_in_flight,
    catalog.PROCESS_ENDS: _process_ends,
    catalog.CONNECTIONS: _connections,
    catalog.CONNECTS: _upstream(lambda stats: stats.connects),
    catalog.REUSES: _upstream(lambda stats: stats.reuses),
    catalog.RECONNECTS: _upstream(lambda stats: stats.retries),
    catalog.FALLBACKS: _cells(lambda layout: layout.fallbacks, _names(counters.FallbackReason)),
    catalog.RELOADS: _reloads,
    catalog.DISCOVERY_AGE: _discovery_ages,
    catalog.CERTIFICATE: _certificate,
}
READ_HISTOGRAM: Final[Mapping[Metric, ReadHistogram]] = {
    catalog.FIRST_TOKEN: _answers(counters.FIRST_TOKEN, counters.STAGE_BOUNDS),
    catalog.INTER_TOKEN: _answers(counters.INTER_TOKEN, counters.GAP_BOUNDS),
    catalog.DURATION: _durations,
    catalog.STAGE: _stages,
    catalog.WORKER_FIRST_BYTE: _times(FIRST_BYTE),
    catalog.WORKER_INTER_TOKEN: _times(GAP),
    catalog.LOOP_LAG: _lag,
}
