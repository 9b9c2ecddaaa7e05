"""Whole answers are judged by what is in them, whatever their status says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.wire.judge import InvalidStream, WorkerFailed, check_answer, judged
from orchestrator.wire.usage import InvalidAnswer, Kv, tokens_in

USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 21, "created_cache_tokens": 0},
}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
PARAMS = {"remote_host": "10.0.0.1", "remote_port": 5600, "remote_block_ids": [[1]]}


def answer(*choices: Any, **more: Any) -> bytes:
    return json.dumps({"id": "c", "choices": list(choices), "usage": USAGE, **more}).encode()


def test_an_answer_that_is_whole_keeps_its_bytes() -> None:
    whole = answer(CHOICE, CHOICE | {"index": 1, "finish_reason": "tool_calls"}, kv_transfer_params=None)
    kv, content, usage = judged(whole, None, None)
    assert (kv, content) == (Kv.TRANSFERRED, whole)
    assert tokens_in(usage or 0) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


def test_both_counts_are_the_prefill_workers() -> None:
    kv, content, _ = judged(answer(CHOICE), 16, 384)
    assert kv is Kv.TRANSFERRED
    details = json.loads(content)["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 16, "created_cache_tokens": 384}


@pytest.mark.parametrize("created", [None, 5])
def test_a_count_that_the_worker_does_not_tell_is_left_out(created: int | None) -> None:
    usage = {
        "prompt_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 21, "created_cache_tokens": None},
    }
    _, content, _ = judged(answer(CHOICE, usage=usage), 16, created)
    details = json.loads(content)["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 16, "created_cache_tokens": None}


@pytest.mark.parametrize("usage", [None, 3, {"prompt_tokens": "many"}, {"prompt_tokens_details": []}])
def test_a_usage_of_another_shape_is_no_reason_to_refuse(usage: Any) -> None:
    whole = answer(CHOICE, usage=usage)
    assert judged(whole, 16, 384)[:2] == (Kv.UNKNOWN, whole)


@pytest.mark.parametrize(
    "choices",
    [
        [],
        [{}],
        [CHOICE | {"finish_reason": None}],
        [CHOICE | {"finish_reason": ""}],
        [CHOICE, CHOICE | {"index": 1, "finish_reason": None}],
        [CHOICE | {"finish_reason": 3}],
        ["stop"],
    ],
)
def test_an_answer_whose_choices_have_not_ended_is_none(choices: list[Any]) -> None:
    with pytest.raises(InvalidAnswer):
        judged(answer(*choices), None, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"stop"', b"{}", b'{"choices":null}', b"\xff"])
def test_what_is_no_completion_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidAnswer):
        judged(content, None, None)


@pytest.mark.parametrize(
    "reason", ['"finish_reason": "%s"', '"finish_reason" :"%s"', '"\\u0066inish_reason":"%s"']
)
def test_an_end_that_is_none(reason: str) -> None:
    document = '{"choices":[{"index":0,"message":{},%s}]}'
    with pytest.raises(InvalidStream, match="by itself"):
        judged((document % (reason % "abort")).encode(), None, None)
    with pytest.raises(WorkerFailed):
        judged((document % (reason % "error")).encode(), None, None)


ERRORS = [
    ({"error": {"message": "boom", "code": 503}}, 503),
    ({"error": {"message": "boom", "code": "x"}}, 500),
    ({"object": "error", "message": "boom", "type": "X", "param": None, "code": 404}, 404),
    ({"message": "failed", "error": {"message": "boom"}}, 500),
    ({"choices": [CHOICE], "error": {"message": "boom"}}, 500),
    ({"choices": 3, "error": {"message": "boom"}}, 500),
]


@pytest.mark.parametrize(("document", "status"), ERRORS)
@pytest.mark.parametrize("separators", [(",", ":"), (" , ", " : ")])
def test_an_error_with_status_200(document: Any, status: int, separators: tuple[str, str]) -> None:
    content = json.dumps(document, separators=separators).encode()
    for judge in (lambda: judged(content, None, None), lambda: check_answer(content)):
        with pytest.raises(WorkerFailed) as failure:
            judge()
        assert failure.value.status == status
        assert json.loads(failure.value.content)["error"]["message"] == "boom"


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_transfer_parameters_are_left_out(name: str) -> None:
    _, content, _ = judged(answer(CHOICE, **{name: PARAMS}), 16, None)
    assert json.loads(content)[name] is None
    assert b"10.0.0.1" not in check_answer(json.dumps({"tokens": [1], name: PARAMS}).encode())


def test_an_answer_of_another_kind_keeps_its_bytes() -> None:
    content = b'{"tokens": [1, 2], "error": null, "count": 2}'
    assert check_answer(content) == content
    with pytest.raises(InvalidAnswer):
        check_answer(b"[]")
