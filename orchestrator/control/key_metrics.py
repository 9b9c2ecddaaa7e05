"""`/metrics` tells what was counted of each API key, by its name.

Names come from the keys file; those beyond the first `MAX_KEYS` are `other`, so that no file makes series
without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.telemetry.counters import RejectReason
from orchestrator.telemetry.tenants import OPEN, REJECTED, REQUESTS, TOKENS, WAITING, KeyCounts

_FAMILIES = (
    (CounterMetricFamily, "baton_key_requests", "Requests that came with an API key.", REQUESTS),
    (CounterMetricFamily, "baton_key_tokens", "Tokens of an API key's prompts and answers.", TOKENS),
    (GaugeMetricFamily, "baton_key_requests_in_flight", "Requests of an API key that have not ended.", OPEN),
    (GaugeMetricFamily, "baton_key_queue_requests", "Of these, those that wait for a seat.", WAITING),
)


class KeyCollector(Collector):
    """It has no families where there are no keys."""

    def __init__(self, counted: Callable[[], Sequence[KeyCounts]]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        counted = self._counted()
        if not counted:
            return
        for kind, name, what, cell in _FAMILIES:
            family = kind(name, what, labels=("key",))
            for key, cells in counted:
                family.add_metric((key,), cells[cell])
            yield family
        yield self._rejections(counted)

    def _rejections(self, counted: Sequence[KeyCounts]) -> Metric:
        family = CounterMetricFamily(
            "baton_key_requests_rejected",
            "Requests of an API key that were sent away before any work on them.",
            labels=("key", "reason"),
        )
        for key, cells in counted:
            for reason in RejectReason:
                family.add_metric((key, reason.name.lower()), cells[REJECTED + reason])
        return family
