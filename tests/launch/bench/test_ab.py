from __future__ import annotations

import pytest

from launch.bench.ab import ratios, run_rounds
from launch.bench.options import STUDIES
from launch.bench.profiles import Plan
from launch.bench.results import Ratio, Step
from launch.bench.shapes import WORKLOADS
from tests.launch.bench.fakes import SLO, FakeEndpoint, run, sample, session_on, step


def steps(*ttfts_ms: float) -> list[Step]:
    return [step([sample(ttft_ms=ttft)]) for ttft in ttfts_ms]


def of_ttft(found: list[Ratio]) -> Ratio:
    return next(ratio for ratio in found if ratio.metric == "ttft p50 ms")


def test_each_round_is_compared_with_itself() -> None:
    """The machine may be slower in one round than in another: both arms are."""
    found = of_ttft(ratios({"a": steps(10, 20, 40), "b": steps(5, 10, 22), "a again": steps(11, 20, 38)}))
    assert (found.arm, found.workload) == ("b", "chat")
    assert (found.low, found.median, found.high) == pytest.approx((0.5, 0.5, 0.55))
    assert (found.noise_low, found.noise_high) == pytest.approx((0.95, 1.1))
    assert found.is_beyond_noise


def test_a_difference_within_the_noise_is_none() -> None:
    found = of_ttft(ratios({"a": steps(10, 10), "b": steps(8, 12), "a again": steps(9, 13)}))
    assert not found.is_beyond_noise


def test_rounds_that_failed_are_left_out() -> None:
    failed = step([sample(error="timeout")])
    found = ratios(
        {"a": [*steps(10), failed, *steps(10)], "b": [*steps(20, 20), failed], "a again": steps(10, 10, 10)}
    )
    assert of_ttft(found).low == of_ttft(found).high == pytest.approx(2.0)


def test_a_first_round_that_failed_hides_nothing() -> None:
    failed = step([sample(error="timeout")])
    found = ratios({"a": [failed, *steps(10)], "b": steps(20, 20), "a again": steps(10, 10)})
    assert of_ttft(found).median == pytest.approx(2.0)


def test_nothing_but_failures_has_no_ratio() -> None:
    failed = step([sample(error="timeout")])
    assert ratios({"a": [failed], "b": [failed], "a again": [failed]}) == []


def test_every_arm_serves_the_same_schedule_in_every_round() -> None:
    endpoints = {"a": FakeEndpoint(), "b": FakeEndpoint()}
    arms = {label: session_on(endpoint, salt=label) for label, endpoint in endpoints.items()}
    plan = Plan([WORKLOADS["chat"]], 200, 0.02, (), SLO)
    found = run(run_rounds(arms, plan, 3, "0"))
    assert {label: [each.requests for each in made] for label, made in found.items()} == {
        "a": [4] * 3,
        "b": [4] * 3,
        "a again": [4] * 3,
    }
    lengths = {
        label: [asked["max_tokens"] for asked in endpoint.seen[1:]] for label, endpoint in endpoints.items()
    }
    rounds_of_b = [sorted(lengths["b"][start : start + 4]) for start in (0, 4, 8)]
    rounds_of_a = [sorted(lengths["a"][start : start + 4]) for start in range(0, 24, 4)]
    assert rounds_of_a == [each for each in rounds_of_b for _ in range(2)]
    texts = [str(asked["messages"]) for endpoint in endpoints.values() for asked in endpoint.seen]
    assert len(set(texts)) == len(texts)  # nothing is found in a cache


def test_studies_are_made_of_workloads() -> None:
    assert all(name in WORKLOADS for names in STUDIES.values() for name in names)
