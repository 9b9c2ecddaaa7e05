from __future__ import annotations

import pytest

from launch.bench.sample import Sample, Slo
from tests.launch.bench.fakes import SLO, sample


def test_latencies_count_from_the_schedule_not_from_the_sending() -> None:
    """Or a client that falls behind would hide how long its users wait."""
    late = sample(ttft_ms=900, late_ms=800)
    assert late.ttft_s == pytest.approx(0.9)
    assert late.late_s == pytest.approx(0.8)
    assert late.end_to_end_s == pytest.approx(0.91)
    assert not late.is_good(SLO)


def test_times_between_tokens() -> None:
    made = sample(itl_ms=5, tokens=4)
    assert list(made.gaps_s()) == pytest.approx([0.005] * 3)
    assert made.tpot_s == pytest.approx(0.005)


def test_tokens_are_those_that_the_endpoint_counts() -> None:
    """It may send several in one event, and events without any."""
    made = sample(itl_ms=5, tokens=5)
    assert made.usage is not None
    made.arrivals = made.arrivals[::2]
    assert made.output_tokens == 5
    assert made.tpot_s == pytest.approx(0.005)
    assert list(made.gaps_s()) == pytest.approx([0.01] * 2)
    made.usage = None
    assert made.output_tokens == 3


def test_one_token_has_no_time_per_token() -> None:
    made = sample(tokens=1)
    assert made.tpot_s is None
    assert list(made.gaps_s()) == []
    assert made.is_good(SLO)


@pytest.mark.parametrize(
    ("made", "is_good"),
    [
        (sample(ttft_ms=99, itl_ms=9), True),
        (sample(ttft_ms=101, itl_ms=9), False),
        (sample(ttft_ms=99, itl_ms=11), False),
        (sample(error="timeout"), False),
    ],
)
def test_a_good_request_keeps_to_both_limits(made: Sample, is_good: bool) -> None:
    assert made.is_good(Slo(ttft_ms=100, itl_ms=10, share=1)) is is_good


def test_the_first_error_counts() -> None:
    made = sample(error="error in stream")
    made.fail("cut short", "")
    assert (made.error, made.detail) == ("error in stream", "why error in stream")
