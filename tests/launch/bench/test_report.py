from __future__ import annotations

import msgspec

from launch.bench.ab import ratios
from launch.bench.compare import compare, differences
from launch.bench.report import report, report_ab, report_comparison
from launch.bench.results import AB_FORMAT, AbResult, Step
from launch.bench.sample import Sample
from tests.launch.bench.fakes import result, sample, step


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_one_step_is_told_in_full() -> None:
    timed = sample(ttft_ms=20, itl_ms=2, stages={"prefill": 12.0}, path="disaggregated")
    text = report(result(step([timed, sample(error="timeout")], seconds=2.0)))
    assert "chat, 4 req/s: 1 of 2 answered in 2.0 s" in text
    assert "0.50 answers/s, 0.50 good/s, 2 tokens/s" in text
    assert "prompts of 7 tokens (0% cached), answers of 3" in text
    assert "paths: disaggregated 1" in text
    assert ["TTFT", *["20.0"] * 5] in rows(text)
    assert ["server:", "prefill", *["12.0"] * 5] in rows(text)
    assert "chat, 4 req/s: 1 x timeout, the first: why timeout" in text


def test_an_endpoint_that_counts_nothing() -> None:
    uncounted = sample()
    uncounted.usage = None
    assert "the endpoint counts no tokens" in report(result(step([uncounted])))


def test_several_steps_are_a_table() -> None:
    staged = sample(ttft_ms=20, stages={"queue": 1.5})
    text = report(result(step([staged]), step([sample(error="timeout")], rate=8)))
    found = {" ".join(row[:3]): row[3:] for row in rows(text)}
    assert found["chat, 4 req/s"][0] in ("1", "queue")
    assert found["chat, 8 req/s"][:2] == ["0", "1"]
    assert "-" in found["chat, 8 req/s"]
    assert ["chat,", "4", "req/s", "queue", *["1.50"] * 5] in rows(text)


def test_the_sustained_rate() -> None:
    text = report(msgspec.structs.replace(result(step(), step()), sustained={"chat": 12.3456, "mixed": 0.0}))
    assert "chat: 12.3 req/s sustained (90% good)" in text
    assert "mixed: no rate could be sustained (90% good)" in text


def warnings(*steps: Step) -> list[str]:
    return [line for line in report(result(*steps)).splitlines() if line.startswith("warning:")]


def quick_answers() -> list[Sample]:
    return [sample(ttft_ms=20) for _ in range(10)]


def test_a_run_that_shows_the_endpoint_needs_no_warning() -> None:
    assert warnings(step(quick_answers())) == []


def test_a_client_at_its_own_limit_is_seen() -> None:
    (warning,) = warnings(step(quick_answers(), cpu=0.95))
    assert "this client was the limit, not the endpoint: it took 95% of a core" in warning


def test_a_client_that_falls_behind_is_seen() -> None:
    late = [sample(ttft_ms=90, late_ms=60) for _ in range(10)]
    (warning,) = warnings(step(late))
    assert "1 % of the requests were sent over 60 ms late" in warning


def test_a_step_that_is_too_short_for_its_answers_is_seen() -> None:
    (warning,) = warnings(step([sample(ttft_ms=600)]))
    assert "too short for answers that take so long" in warning


def test_a_comparison_shows_what_makes_it_unfair() -> None:
    a, b = result(step([sample(ttft_ms=20)])), result(step([sample(ttft_ms=30)]), seed=7)
    text = report_comparison(list(compare(a, b)), differences(a, b))
    assert ["chat,", "4", "req/s", "ttft", "p50", "ms", "20.0", "30.0", "1.500"] in rows(text)
    assert "warning: A and B differ in seed: 0 and 7" in text


def test_an_ab_test_shows_ratios_beside_the_noise() -> None:
    steps = {
        "json": [step([sample(ttft_ms=20)])],
        "msgpack": [step([sample(ttft_ms=10)])],
        "json again": [step([sample(ttft_ms=21), sample(error="timeout")])],
    }
    text = report_ab(ab_result(steps))
    assert "transport: 1 rounds, ratios to json" in text
    row = next(row for row in rows(text) if row[:3] == ["chat", "ttft", "p50"])
    assert row[3:] == [
        "ms",
        "msgpack",
        "0.500",
        "(0.500",
        "to",
        "0.500)",
        "1.050",
        "to",
        "1.050",
        "beyond",
        "noise",
    ]
    assert "json again: chat, 4 req/s: 1 x timeout" in text


def ab_result(steps: dict[str, list[Step]]) -> AbResult:
    return AbResult(
        format=AB_FORMAT,
        created="2026-01-01T00:00:00+00:00",
        study="transport",
        salt="s",
        arms={label: f"http://{label}" for label in list(steps)[:-1]},
        setup=result().setup,
        rounds=1,
        ratios=ratios(steps),
        steps=steps,
    )
