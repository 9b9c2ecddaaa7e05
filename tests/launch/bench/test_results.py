from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.errors import BenchError
from launch.bench.results import Load, Unit, load, quantile, save, spread
from tests.launch.bench.fakes import SLO, result, sample, step

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2)


@given(NUMBERS)
def test_quantiles_are_those_of_the_standard_library(values: list[float]) -> None:
    ordered = sorted(values)
    expected = statistics.quantiles(values, n=20, method="inclusive")
    assert [quantile(ordered, n / 20) for n in range(1, 20)] == pytest.approx(expected, abs=1e-6)


@given(NUMBERS)
def test_a_spread_is_ordered(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.count == len(values)
    assert found.min <= found.p10 <= found.p50 <= found.p90 <= found.p99 <= found.max
    assert (found.min, found.max) == (min(values), max(values))
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)


def test_of_nothing_and_of_one() -> None:
    assert spread([]) is None
    found = spread([3.0])
    assert found is not None
    assert (found.min, found.p50, found.max) == (3, 3, 3)


def test_what_a_step_counts() -> None:
    good, slow, failed = sample(), sample(ttft_ms=500), sample(error="timeout")
    found = step([good, slow, failed, sample(error="http 500"), sample(error="timeout")], seconds=2.0)
    assert (found.requests, found.ok, found.good) == (5, 2, 1)
    assert (found.rate, found.goodput, found.token_rate) == (1.0, 0.5, 3.0)
    assert found.errors == {"timeout": 2, "http 500": 1}
    assert found.error_details == {"timeout": "why timeout", "http 500": "why http 500"}
    assert found.prompt_tokens == 14


def test_latencies_are_of_answers_and_lateness_is_of_all() -> None:
    found = step([sample(ttft_ms=20, itl_ms=2, tokens=3, late_ms=1), sample(error="timeout", late_ms=3)])
    assert {name: each.count for name, each in found.times.items()} == {
        "ttft": 1,
        "itl": 2,
        "tpot": 1,
        "e2e": 1,
        "late": 2,
    }
    assert found.times["ttft"].p50 == pytest.approx(20)
    assert found.times["itl"].p50 == pytest.approx(2)
    assert found.times["e2e"].p50 == pytest.approx(24)
    assert found.times["late"].max == pytest.approx(3)


def test_stages_and_paths() -> None:
    found = step(
        [
            sample(stages={"queue": 1.0, "prefill": 10.0}, path="disaggregated"),
            sample(stages={"queue": 3.0}, path="aggregated"),
            sample(),
        ]
    )
    assert {name: (each.count, each.mean) for name, each in found.stages.items()} == {
        "queue": (2, 2.0),
        "prefill": (1, 10.0),
    }
    assert found.paths == {"disaggregated": 1, "aggregated": 1}


def test_a_step_holds_if_enough_requests_are_good() -> None:
    """A failed request is not."""
    assert step([sample()] * 9 + [sample(ttft_ms=500)]).holds(SLO)
    assert not step([sample()] * 9 + [sample(error="timeout")] * 2).holds(SLO)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Load(4, Unit.RATE), "4 req/s"),
        (Load(3.17213, Unit.RATE), "3.17 req/s"),
        (Load(2048, Unit.CONCURRENT), "2048 at once"),
    ],
)
def test_loads_are_readable(made: Load, text: str) -> None:
    assert str(made) == text


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    made = result(step([sample(), sample(error="timeout")]), step(rate=8))
    save(made, path)
    assert load(path) == made


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b"", "is no result of baton bench"),
        (b"\xff", "is no result of baton bench"),
        (b"{}", "is no result of baton bench"),
        (b'{"steps": 3}', "is no result of baton bench"),
    ],
)
def test_what_is_no_result(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchError, match=said) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save(result(), str(path))
    path.write_text(path.read_text().replace("baton-bench/1", "baton-bench/2"))
    with pytest.raises(BenchError, match="has the format 'baton-bench/2'"):
        load(str(path))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="Is a directory"):
        save(result(), str(tmp_path))
