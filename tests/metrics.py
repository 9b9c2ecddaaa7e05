"""Values of a page of metrics."""

from __future__ import annotations


def sum_of(page: str, name: str) -> float:
    """The sum of a metric's samples; one that was never counted has 0."""
    lines = page.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0] == name)
