from __future__ import annotations

import msgspec
import pytest

from launch.bench.compare import compare, differences, metrics_of
from launch.bench.sample import Slo
from tests.launch.bench.fakes import result, sample, step


def test_ratios_are_of_the_second_to_the_first() -> None:
    a = result(step([sample(ttft_ms=20, itl_ms=4)]))
    b = result(step([sample(ttft_ms=30, itl_ms=2)]))
    rows = {row.metric: row for row in compare(a, b)}
    assert rows["ttft p50 ms"].ratio == pytest.approx(1.5)
    assert rows["itl p99 ms"].ratio == pytest.approx(0.5)
    assert rows["answers/s"].ratio == 1
    assert {row.step for row in rows.values()} == {"chat, 4 req/s"}


def test_only_the_same_steps_are_compared() -> None:
    a, b = result(step(), step(rate=8)), result(step(rate=8), step(workload="mixed"))
    assert {row.step for row in compare(a, b)} == {"chat, 8 req/s"}
    assert differences(a, b) == [
        "only in one of them: chat, 4 req/s",
        "only in one of them: mixed, 4 req/s",
    ]


def test_what_was_not_measured_has_no_ratio() -> None:
    failed = step([sample(error="timeout")])
    rows = {row.metric: row for row in compare(result(failed), result())}
    assert rows["answers/s"].ratio is None
    assert "ttft p50 ms" not in rows
    assert set(metrics_of(failed)) == {"answers/s", "goodput/s", "tokens/s"}


def test_sustained_rates_are_compared() -> None:
    a = msgspec.structs.replace(result(), sustained={"chat": 10.0, "mixed": 1.0})
    b = msgspec.structs.replace(result(), sustained={"chat": 12.0})
    assert [row.ratio for row in compare(a, b) if row.metric == "sustained req/s"] == [pytest.approx(1.2)]


def test_an_unfair_comparison_says_so() -> None:
    assert differences(result(), result()) == []
    assert differences(result(seed=1), result(seed=2)) == ["seed: 1 and 2"]
    strict = Slo(ttft_ms=1, itl_ms=1, share=1)
    assert differences(result(), result(slo=strict))[0].startswith("slo: ")
