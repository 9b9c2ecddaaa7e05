"""A frame is what `baton top` shows at one moment: workers, totals, queue, leases, processes, keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from launch.operate.rows import Row, rows_of

if TYPE_CHECKING:
    from launch.remote import Run

# The sums of these samples of /metrics are shown; what a page has not is left out.
TOTALS: Final[Mapping[str, str]] = {
    "requests": "baton_requests_total",
    "errors": "baton_errors_total",
    "rejected": "baton_requests_rejected_total",
    "retries": "baton_upstream_retries_total",
    "in_flight": "baton_requests_in_flight",
}
QUEUE: Final = "baton_queue_requests"
LEASES: Final = "baton_kv_leases"
KEY: Final = "key"  # the label of whatever is counted for each key
_WHOLE: Final = ("decode", "both")  # each request ends at one of these


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample is one line of /metrics."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Frame:
    """Counts are since the start of the orchestrator; rates are per second, of workers over half a minute."""

    time: float  # by `time.time()`
    rate: float  # requests that ended well
    totals: Mapping[str, float]
    queue: Mapping[str, float]  # requests that wait, by model
    leases: Mapping[str, float]  # KV leases that are open, by state
    keys: Mapping[str, Mapping[str, float]]  # by key, what /metrics counts for it
    rows: Sequence[Row]
    data_processes: Sequence[Mapping[str, Any]]

    def document(self) -> dict[str, Any]:
        return asdict(self)


def make_frame(
    now: float,
    run: Run | None,
    workers: Sequence[Mapping[str, Any]],
    processes: Sequence[Mapping[str, Any]],
    metrics: str,
) -> Frame:
    """Return a frame of what the admin listener has answered."""
    rows = rows_of(run, workers)
    samples = list(_samples(metrics))
    return Frame(
        time=now,
        rate=sum(row["rate"] or 0.0 for row in rows if row["role"] in _WHOLE),
        totals={
            name: sum(one.value for one in samples if one.name == metric)
            for name, metric in TOTALS.items()
            if any(one.name == metric for one in samples)
        },
        queue=_by(samples, QUEUE, "model"),
        leases=_by(samples, LEASES, "state"),
        keys=_keys(samples),
        rows=rows,
        data_processes=processes,
    )


def _samples(metrics: str) -> Iterator[Sample]:
    """Yield the samples that are shown: a page has thousands of buckets, which are not."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = (*TOTALS.values(), QUEUE, LEASES)
    lines = [line for line in metrics.split("\n") if _is_wanted(line, wanted)]
    for family in text_string_to_metric_families("\n".join(lines)):
        for sample in family.samples:
            yield Sample(sample.name, sample.labels, sample.value)


def _is_wanted(line: str, wanted: tuple[str, ...]) -> bool:
    if line.startswith("#"):
        return False
    name, brace, labels = line.partition("{")
    if not brace:
        name = line.partition(" ")[0]
    if name.endswith(("_bucket", "_created")):
        return False
    return name in wanted or f'{KEY}="' in labels


def _by(samples: Sequence[Sample], name: str, label: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)  # several orchestrators have a sample each
    for one in samples:
        if one.name == name:
            found[one.labels.get(label, "")] += one.value
    return dict(found)


def _keys(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return what is counted for each key, by the name of the metric without what all have."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in samples:
        if KEY in one.labels:
            name = one.name.removeprefix("baton_").removeprefix("key_").removesuffix("_total")
            found[one.labels[KEY]][name] += one.value
    return {key: dict(values) for key, values in found.items()}


def rates(frame: Frame, before: Frame | None) -> dict[str, float]:
    """Return by how much per second the totals have grown since another frame; nothing without one."""
    if before is None or frame.time <= before.time:
        return {}
    seconds = frame.time - before.time
    return {
        name: max(0.0, value - before.totals[name]) / seconds
        for name, value in frame.totals.items()
        if name in before.totals and name != "in_flight"
    }
