"""Which metrics an expression names."""

from __future__ import annotations

import re

from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, Kind

_NAME = re.compile(r"\b(?:baton|process)_[a-z0-9_]+")
_SUFFIXES = ("_bucket", "_count", "_sum")


def declared_series() -> frozenset[str]:
    """The names of all series, as expressions have them."""
    names: set[str] = set()
    for metric in (*METRICS, *PROCESS_METRICS):
        is_histogram = metric.kind is Kind.HISTOGRAM
        names |= {metric.name + suffix for suffix in _SUFFIXES} if is_histogram else {metric.name}
    return frozenset(names)


def named_in(expression: str) -> frozenset[str]:
    return frozenset(_NAME.findall(expression))
