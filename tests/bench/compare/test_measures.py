from __future__ import annotations

from typing import Any

import httpx
import pytest

from bench.compare.measures import OpenLoop, _open_loop_sample, check_answer
from bench.shared.processes import Failed

EVENT = 'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


def completion(status: int = 200, text: str = '{"choices":[{"index":0}]}') -> httpx.Response:
    return httpx.Response(status, text=text, headers={"content-type": "application/json"})


def stream(text: str) -> httpx.Response:
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream; charset=utf-8"})


@pytest.mark.parametrize("answer", [completion(), stream(EVENT + "data: [DONE]\n\n")])
def test_whole_answers_pass(answer: httpx.Response) -> None:
    check_answer(answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(422, "no such\n variant"), "HTTP 422: no such variant"),
        (completion(text="{}"), "not an answer: {}"),
        (completion(text="<html>"), "not an answer: <html>"),
        (stream(EVENT), "not an answer: data:"),
        (stream("data: [DONE]\n\n"), "not an answer: data: [DONE]"),
    ],
)
def test_anything_else_is_the_reason(answer: httpx.Response, reason: str) -> None:
    with pytest.raises(Failed) as failed:
        check_answer(answer)
    assert str(failed.value).startswith(reason)


def step(**changes: Any) -> dict[str, Any]:
    times = {"e2e": {"p50": 1.5, "p99": 4.0}, "ttft": {"p50": 1.0, "p99": 3.0}}
    return {"requests": 100, "ok": 100, "seconds": 2.0, "errors": {}, "times": times, **changes}


def test_open_loop_sample_has_a_figure_for_every_column() -> None:
    sample = _open_loop_sample(step())
    assert set(sample) == {column.key for column in OpenLoop().columns}
    assert (sample["p50_ms"], sample["ttft_p99_ms"], sample["per_second"]) == (1.5, 3.0, 50.0)


def test_open_loop_with_errors_has_no_figure() -> None:
    with pytest.raises(Failed, match=r"^3 of 100 failed: \{'http 502': 3\}$"):
        _open_loop_sample(step(ok=97, errors={"http 502": 3}))
