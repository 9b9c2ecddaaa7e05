from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bench.soak.measures import Held, Sample, after, judge, of_answers, slope

START = Held(descriptors=17, tasks=9, requests=0, legs=0, busy_connections=0, kv_blocks=0, kv_pins=0)


def growing(mb_per_10_000: float, requests: int = 200_000) -> list[Sample]:
    steps = range(0, requests + 1, requests // 100)
    return [Sample(done, int(60e6 + done * mb_per_10_000 * 100)) for done in steps]


def test_slope_is_in_mb_per_10_000_requests() -> None:
    assert slope(growing(2.5)) == pytest.approx(2.5)
    assert slope(growing(0.0)) == 0.0


def test_slope_is_least_squares() -> None:
    assert slope([Sample(0, 0), Sample(10_000, 9_000_000), Sample(20_000, 6_000_000)]) == pytest.approx(3.0)


def test_samples_after_a_share_of_the_requests() -> None:
    assert [sample.requests for sample in after(growing(1.0, 1000), 0.98)] == [980, 990, 1000]


def missed(samples: Sequence[Sample], end: Held = START) -> list[str]:
    verdicts = judge(samples, limit_mb=1.0, start=START, end=end)
    return [verdict.goal.partition(":")[0] for verdict in verdicts if not verdict.holds]


def test_all_is_well_if_memory_is_level_and_nothing_is_held() -> None:
    assert missed(growing(0.9)) == []


def test_memory_that_grows_is_a_missed_goal() -> None:
    assert missed(growing(1.1)) == ["slope, all but the first tenth", "slope, second half"]


def test_warm_up_does_not_count() -> None:
    first = [replace(sample, rss=0) for sample in growing(0.0)[:10]]
    assert missed([*first, *growing(0.0)[10:]]) == []


def test_a_late_leak_shows_in_the_second_half() -> None:
    level = [Sample(done, 60_000_000) for done in range(0, 150_000, 2000)]
    late = [Sample(done, 60_000_000 + (done - 150_000) * 400) for done in range(150_000, 200_001, 2000)]
    assert "slope, second half" in missed([*level, *late])


@pytest.mark.parametrize("name", ["descriptors", "tasks", "requests", "kv_blocks", "kv_pins"])
def test_what_is_still_held_is_a_missed_goal(name: str) -> None:
    end = replace(START, **{name: getattr(START, name) + 1})
    assert missed(growing(0.0), end) == [name.replace("_", " ")]
    assert end.beyond(START) == {name: getattr(end, name)}


def test_less_than_at_the_start_is_no_leak() -> None:
    end = replace(START, descriptors=15)
    assert (missed(growing(0.0), end), end.beyond(START)) == ([], {})


def test_wrong_answers_are_named() -> None:
    assert of_answers({}).holds
    verdict = of_answers({"chat: HTTP 502": 3})
    assert (verdict.holds, verdict.found) == (False, "3 x chat: HTTP 502")


def test_not_all_wrong_answers_are_listed() -> None:
    assert of_answers({f"chat: HTTP {status}": 1 for status in range(500, 600)}).found.count("HTTP") == 5
