"""Traces in all formats; what is malformed is told with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.simulate.errors import SimulationError
from launch.simulate.formats import read_trace
from launch.simulate.trace import Arrival, prompt_bytes
from launch.simulate.view import SESSION, SimulatedRequest
from orchestrator.telemetry.decisions import BLOCK_BYTES, names_of
from tests.launch.simulate.sites import row, trace_file

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# --- what is right ------------------------------------------------------------------------------


def test_mooncakes(tmp_path: Path) -> None:
    rows = [row(0, 1100, 7, (0, 5, 9)), row(27_482, 512, 0, (0,))]
    trace = read_trace(trace_file(tmp_path, rows), "m")
    assert (trace.block_tokens, trace.resolution_s) == (512, 0.0)
    first, second = trace.arrivals
    assert (first.prompt_tokens, first.output_tokens, first.blocks, first.tail) == (1100, 7, (0, 5), 9)
    assert (second.at_s, second.output_tokens, second.blocks) == (27.482, 1, (0,))
    assert (first.session, second.session) == (5, None)


def test_unknown_fields_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    text = '\n{"timestamp": 1, "input_length": 2, "output_length": 3, "type": "chat"}\n\n'
    (arrival,) = read_trace(written(tmp_path, text), "m").arrivals
    assert (arrival.prompt_tokens, arrival.blocks) == (2, ())


def test_azures(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,0\n"
    trace = read_trace(written(tmp_path, text), "m")
    found = [(arrival.at_s, arrival.prompt_tokens, arrival.output_tokens) for arrival in trace.arrivals]
    assert found == [(0.0, 4808, 1), (pytest.approx(0.052), 3180, 8)]


def test_azures_with_a_time_zone(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.017335+00:00,2399,6\n"
    assert [arrival.prompt_tokens for arrival in read_trace(written(tmp_path, text), "m").arrivals] == [
        2162,
        2399,
    ]


def test_our_own(tmp_path: Path) -> None:
    prompt = b"x" * 3 * BLOCK_BYTES
    own = {"received": 1e9 + 5, "model": "m", "prompt_tokens": 768, "output_tokens": 9}
    lines = [
        {**own, "blocks": names_of(prompt, 3)},
        {**own, "received": 1e9, "prompt_tokens": 300, "blocks": names_of(prompt, 3)},
        {**own, "model": "other"},
    ]
    trace = read_trace(written(tmp_path, "\n".join(map(json.dumps, lines))), "m")
    assert trace.block_tokens == BLOCK_BYTES // 4
    first, second = trace.arrivals
    assert (first.at_s, second.at_s) == (0.0, 5.0)
    assert len(second.blocks) == 3
    assert first.blocks == second.blocks[:1]  # no more than the prompt has


def test_moments_that_were_rounded_are_drawn_within_their_step(tmp_path: Path) -> None:
    rows = [row(step * 3000 + (step == 4), 10) for step in range(20) for _ in range(5)]
    trace = read_trace(trace_file(tmp_path, rows), "m")
    assert trace.resolution_s == 3.0
    moments = [at_s for at_s, _ in trace.moments(1.0, Random(1))]
    assert moments == sorted(moments)
    assert len({*moments}) == 100
    assert 55 < moments[-1] - moments[0] <= 60
    assert moments != [at_s for at_s, _ in trace.moments(1.0, Random(2))]
    assert [at_s for at_s, _ in trace.moments(2.0, Random(1))] == [at_s / 2 for at_s in moments]


def test_a_few_requests_at_the_same_moment_stay_there(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, [row(0, 10), row(0, 10), row(0, 10)]), "m")
    assert [at_s for at_s, _ in trace.moments(1.0, Random(1))] == [0.0, 0.0, 0.0]


# --- what is not --------------------------------------------------------------------------------


def row_of(prompt: int, count: int) -> str:
    return json.dumps(row(1, prompt, blocks=tuple(range(count)))) + "\n"


GOOD = '{"timestamp": 1, "input_length": 2, "output_length": 3}\n'
WRONG = {
    "not JSON": (GOOD + "{nothing\n", r":2: "),
    "cut": (GOOD + '{"timestamp": 1, "input_', r":2: "),
    "another document": (GOOD + "[1]\n", r":2: Expected `object`, got `array`"),
    "a field is missing": (GOOD + '{"timestamp": 1, "output_length": 3}\n', r":2: .*`input_length`"),
    "no moment": ('{"input_length": 1, "output_length": 3}\n', r":1: .*`timestamp`"),
    "too few hash ids": (
        GOOD + row_of(1025, 1),
        r":2: `hash_ids` has 1, but `input_length` 1025 is 3 blocks",
    ),
    "too many hash ids": (row_of(1025, 4), r":1: `hash_ids` has 4, but `input_length` 1025 is 3 blocks"),
    "another type": (GOOD.replace("2", '"2"', 1), r":1: Expected `int`, got `str` - at `\$.input_length`"),
    "no tokens": (GOOD.replace("2", "0", 1), r":1: Expected `int` >= 1"),
    "negative": (GOOD.replace("3", "-3", 1), r":1: Expected `int` >= 0"),
    "before the beginning": (GOOD.replace("1", "-1", 1), r":1: Expected `float` >= 0"),
    "hash ids of text": ('{"timestamp":1,"input_length":2,"output_length":3,"hash_ids":["a"]}', r":1: "),
    "no header": ("2023-11-16 18:17:03.9799600,4808,10\n", r":1: expected .*TIMESTAMP"),
    "another header": ("a,b,c\n1,2,3\n", r":1: expected .*TIMESTAMP"),
    "only a header": (AZURE, r"there is no request in it"),
    "too few columns": (AZURE + "2023-11-16 18:17:03.9799600,4808\n", r":2: expected a row such as"),
    "no time": (AZURE + "yesterday,4808,10\n", r":2: expected a row such as"),
    "no number": (AZURE + "2023-11-16 18:17:03.9799600,x,10\n", r":2: expected a row such as"),
    "a negative number": (AZURE + "2023-11-16 18:17:03.97,-1,10\n", r":2: .* negative"),
    "nothing": ("", r"there is no request in it"),
    "white space": ("\n \n", r"there is no request in it"),
    "no text": (b"\xff\xfe\x00", r"it is no text"),
    "our own without a model": ('{"received": 1, "prompt_tokens": 3}\n', r":1: .*`model`"),
    "our own with wrong blocks": (
        '{"received": 1, "model": "m", "prompt_tokens": 3, "blocks": "xyz"}\n',
        r":1: .*blocks",
    ),
    "only other models": (
        '{"received": 1, "model": "n", "prompt_tokens": 3}\n',
        "for the model 'm' in it; models in it: n",
    ),
    "only what was refused": (
        '{"received": 1, "model": "m", "prompt_tokens": 3, "status": 400}\n',
        "no served request for the model 'm'",
    ),
    "seconds for milliseconds": (GOOD + GOOD.replace("1", "1e300", 1), "nothing comes for .* a mistake"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path: Path, name: str) -> None:
    text, message = WRONG[name]
    path = written(tmp_path, text)
    with pytest.raises(SimulationError, match=message) as caught:
        read_trace(path, "m")
    assert str(caught.value).startswith(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"gone: No such file"):
        read_trace(str(tmp_path / "gone"), "m")


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "received", "model", "prompt_tokens")


@given(document=st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_no_line_does_anything_else(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    path = written(tmp_path_factory.mktemp("traces"), json.dumps(document))
    message, trace = path, None
    try:
        trace = read_trace(path, "m")
    except SimulationError as error:
        message = str(error)
    assert message.startswith(path)
    if trace is not None:
        view = SimulatedRequest("m", trace.arrivals[0], trace.block_tokens)
        assert len(view.prompt(1000)) == min(1000, view.body_bytes())


# --- what policies see --------------------------------------------------------------------------


def test_prompts_that_begin_alike_have_bytes_that_begin_alike() -> None:
    one, other = Arrival(1, 0.0, 1600, 1, (7, 8, 9)), Arrival(2, 0.0, 1700, 1, (7, 8, 10))
    a, b = (prompt_bytes(arrival, 512, 1 << 20) for arrival in (one, other))
    assert (len(a), len(b)) == (6400, 6800)
    assert a[:4096] == b[:4096]
    assert a[4096:4100] != b[4096:4100]
    assert prompt_bytes(one, 512, 5000) == a[:5000]


def test_what_is_left_behind_the_blocks_is_equal_only_if_it_has_a_name() -> None:
    def tail(index: int, name: int | None) -> bytes:
        return prompt_bytes(Arrival(index, 0.0, 600, 1, (7,), tail=name), 512, 1 << 20)[2048:]

    assert tail(1, None) != tail(2, None)
    assert tail(1, 9) == tail(2, 9)


def test_the_session_is_a_header() -> None:
    view = SimulatedRequest("m", Arrival(1, 0.0, 600, 1, session=5), 512)
    assert (view.header(SESSION), view.header(b"other"), view.field("user")) == (b"5", None, None)
    assert (view.prompt_ids(), view.prompt_tokens(), view.body_bytes()) == (None, 600, 2400)
