"""The comparison in real time: what is sent, what becomes figures, and Baton alone between two workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.routing.real import arguments, figures, paced, sampled, simulated, table
from bench.routing.replay import Planned, Replayed, body_of, is_token, planned, prompt_of
from launch.simulate.formats import read_trace
from launch.simulate.models import LARGE
from launch.simulate.trace import Arrival, Trace
from worker.sim import text

BLOCK = 64


def test_prompts_begin_alike_where_blocks_do() -> None:
    first = prompt_of(Arrival(0, 0.0, 3 * BLOCK, 1, (1, 2), tail=3), BLOCK)
    second = prompt_of(Arrival(1, 0.0, 3 * BLOCK + 9, 1, (1, 2, 4)), BLOCK)
    per_block = len(first) // 3
    assert first[: 2 * per_block] == second[: 2 * per_block]
    assert first[2 * per_block :] != second[2 * per_block : 3 * per_block]


@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 7])
def test_prompts_have_as_many_tokens_as_in_the_trace(tokens: int) -> None:
    arrival = Arrival(0, 0.0, tokens, 1, tuple(range(tokens // BLOCK)))
    assert len(text.encode(prompt_of(arrival, BLOCK))) == tokens


def test_what_has_no_name_is_alone() -> None:
    prompts = {prompt_of(Arrival(index, 0.0, 20, 1), BLOCK) for index in range(3)}
    assert len(prompts) == 3


def test_answers_are_shortened_and_never_empty() -> None:
    bodies = [json.loads(body_of(Arrival(0, 0.0, 9, tokens, ()), BLOCK, 8)) for tokens in (3, 80)]
    assert [body["max_tokens"] for body in bodies] == [1, 10]
    assert all(body["stream"] and body["ignore_eos"] for body in bodies)


def test_the_first_requests_come_as_many_times_as_fast() -> None:
    trace = Trace([Arrival(index, 2.0 * index, 9, 1) for index in range(5)], BLOCK)
    assert [request.at_s for request in planned(trace, 3, 4.0, 1, seed=0)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n', False),
        (b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n', False),
        (b'data: {"choices":[{"delta":{"content":" river"}}]}\n', True),
        (b"data: [DONE]\n", False),
    ],
)
def test_a_token_is_one_with_text(line: bytes, expected: bool) -> None:
    assert is_token(line) is expected


def test_engines_at_a_pace_take_less_time() -> None:
    assert paced(LARGE, 4.0).prefill_s(1000, 200) == pytest.approx(LARGE.prefill_s(1000, 200) / 4)


def test_figures_are_medians_in_the_time_of_the_engines() -> None:
    samples = [figures(Replayed([one, one], [0.0], failed=1), 0.25) for one in (1.0, 2.0, 6.0)]
    title, line = table({"router": samples}, second=0.5)
    assert title.split()[:3] == ["TTFT", "p50", "s"]
    assert line.split()[:3] == ["router", "4.000", "(2.000-12.000)"]
    assert "0.250 (0.250-0.250)" in line
    assert line.endswith("1 (1-1)")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--workers", "8", "8+8"),
        ("--workers", "0+1", "at least 1"),
        ("--speed", "0", "not positive"),
        ("--policies", "nobody", "baton prefix"),
    ],
)
def test_bad_options_are_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(["--trace", "file", option, value])
    assert said in capsys.readouterr().err


@pytest.mark.processes
def test_baton_serves_a_trace_between_two_workers(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1100, "output_length": 16, "hash_ids": [0, 1, 2]}
    path.write_text("".join(json.dumps(row | {"timestamp": 300 * index}) + "\n" for index in range(6)))
    requests: list[Planned] = planned(read_trace(str(path), ""), 6, 1.0, 8, seed=0)
    with simulated((1, 1), paced(LARGE, 10.0)) as workers:
        found = [sampled("baton prefix", workers, requests) for _ in range(2)]
    for sample in found:
        assert sample["failed"] == 0
        assert sample["ttft_p99_s"] > 0.01
        assert 0.5 < sample["cached"] < 5 / 6
