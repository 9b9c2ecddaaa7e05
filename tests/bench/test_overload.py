from __future__ import annotations

from collections import Counter

import pytest

from bench import overload
from launch.bench.results import ClientLoad, Load, Step, Unit
from launch.bench.sample import Sample


def row(good: int, rate: float, unit: Unit = Unit.RATE) -> overload.Row:
    step = Step(
        workload="short",
        load=Load(rate, unit),
        seconds=2.0,
        requests=good,
        ok=good,
        good=good,
        errors={},
        error_details={},
        prompt_tokens=0,
        cached_tokens=0,
        output_tokens=0,
        times={},
        stages={},
        paths={},
        client=ClientLoad(cpu=0.0, connects=0, reuses=0),
    )
    return overload.Row(step, Counter(), 0.0)


def test_the_worst_load_above_the_capacity_counts() -> None:
    capacity = row(100, 16, Unit.CONCURRENT)
    rows = [capacity, row(80, 50.0), row(96, 100.0), row(90, 250.0)]
    assert overload.worst_share(rows) == pytest.approx(0.9)
    assert overload.worst_share([capacity, row(80, 50.0)]) == 1.0


def test_a_refusal_is_as_fast_as_its_client_knew() -> None:
    samples = [
        Sample(due=0.0, sent=1.0, ended=1.02, error="http 429"),
        Sample(due=0.0, sent=1.0, ended=9.0, error="http 504"),
        Sample(due=0.0, sent=1.0, ended=9.0),
    ]
    found = overload.row_of(row(1, 50.0).step, samples)
    assert found.refused_ms == pytest.approx(20)
    assert found.ended == {"http 429": 1, "http 504": 1, "answered": 1}
    assert "good    0.5/s" in overload.line(found)


def test_loads_are_multiples_of_the_capacity() -> None:
    options = overload.arguments(["--loads", "1.5,4"])
    assert options.loads == [1.5, 4.0]
