"""Metrics are declared as Prometheus' conventions have it."""

from __future__ import annotations

import re

import pytest

from orchestrator.config.options import LimitsConfig, OrchestratorConfig, QueueConfig
from orchestrator.control.readings import READ, READ_HISTOGRAM
from orchestrator.telemetry import catalog
from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, Kind, Metric

LABEL = re.compile(r"[a-z][a-z_]*")
NAME = re.compile(r"baton_[a-z0-9]+(_[a-z0-9]+)*")


def test_no_name_is_declared_twice() -> None:
    names = [metric.name for metric in (*METRICS, *PROCESS_METRICS)]
    assert len(set(names)) == len(names) > 50


def test_each_is_read_by_one_reader() -> None:
    readers = [*READ, *READ_HISTOGRAM, catalog.INFO]
    assert sorted(metric.name for metric in readers) == sorted(metric.name for metric in METRICS)
    assert {metric.kind for metric in READ_HISTOGRAM} == {Kind.HISTOGRAM}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_says_what_it_is(metric: Metric) -> None:
    assert NAME.fullmatch(metric.name)
    assert metric.help.endswith(".")
    assert metric.name.endswith("_total") is (metric.kind is Kind.COUNTER)
    assert all(LABEL.fullmatch(label) for label in metric.labels)
    assert bool(metric.bounds) is (metric.kind is Kind.HISTOGRAM)
    assert not metric.name.endswith("_seconds") or metric.unit == "seconds"
    if metric.panel is not None:
        assert set(metric.panel.by) <= set(metric.labels)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric.bounds], ids=lambda m: m.name)
def test_buckets_reach_above_the_limits(metric: Metric) -> None:
    assert list(metric.bounds) == sorted(set(metric.bounds))
    limits, queue = LimitsConfig(), QueueConfig()
    longest = {
        catalog.LOOP_LAG: OrchestratorConfig().hang_timeout_s,
        catalog.INTER_TOKEN: limits.stream_idle_timeout_s,
        catalog.WORKER_INTER_TOKEN: limits.stream_idle_timeout_s,
    }
    limit = longest.get(metric, max(limits.request_timeout_s, limits.first_byte_timeout_s, queue.timeout_s))
    assert sum(bound > limit for bound in metric.bounds) >= 1
