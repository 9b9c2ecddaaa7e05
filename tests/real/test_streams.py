"""A real vLLM worker whose connections carry many requests: answers are those of plain HTTP, and cancelled
requests end in the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator.wire.info import END_PATH
from orchestrator.wire.streams import LEAVE, RESET_CANCELLED, frame, reset
from tests.real.ask import PREFILL, chat, comparable, completion, post, text_in
from tests.real.conftest import Cluster, metric
from tests.waiting import LIMIT_S, wait_for
from tests.worker.frames import Answer, Mux

JSON = {"content-type": "application/json"}
USAGE = {"stream_options": {"include_usage": True}}
LONG: dict[str, Any] = {"stream": True, "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def mux(cluster: Cluster) -> Iterator[Mux]:
    parts = urlsplit(cluster.prefill)
    with Mux((str(parts.hostname), int(parts.port or 0))) as mux:
        yield mux
    wait_for(lambda: running(cluster) == 0, "the end of all requests")


def running(cluster: Cluster) -> float:
    return metric(cluster.prefill, "vllm:num_requests_running")


def ask(mux: Mux, document: dict[str, Any], **headers: str) -> int:
    path = "/v1/chat/completions" if "messages" in document else "/v1/completions"
    return mux.open("POST", path, json.dumps(document).encode(), JSON | headers)


def said(body: str) -> tuple[str, int]:
    """The text of a whole stream and how many tokens it has. (Several may come in one event.)"""
    events = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
    assert events.pop() == "[DONE]"
    *choices, usage = map(json.loads, events)
    text = "".join(text_in(choice) for event in choices for choice in event["choices"])
    return text, usage["usage"]["completion_tokens"]


def generated(cluster: Cluster) -> float:
    return metric(cluster.prefill, "vllm:generation_tokens_total")


def begin(mux: Mux, number: int) -> Answer:
    answer = mux.answers[number]
    while not answer.body:
        assert mux.read()
    return answer


def test_it_announces_streams(cluster: Cluster, mux: Mux) -> None:
    answer = mux.ask("GET", "/baton/info")
    assert answer.body == httpx.get(f"{cluster.prefill}/baton/info", timeout=LIMIT_S).content
    assert json.loads(answer.body)["streams"] == ["http", "mux"]
    assert "streams" not in httpx.get(f"{cluster.decode}/baton/info", timeout=LIMIT_S).json()


@pytest.mark.parametrize("document", [chat(PREFILL), completion(PREFILL)])
def test_a_whole_answer_is_that_of_plain_http(cluster: Cluster, mux: Mux, document: dict[str, Any]) -> None:
    plain, framed = post(cluster.prefill, document), mux.answer(ask(mux, document))
    assert (framed.status, framed.is_whole) == (plain.status_code, True)
    assert framed.headers.keys() == plain.headers.keys()
    assert comparable(json.loads(framed.body)) == comparable(plain.json())


def test_streams_at_once_are_those_of_plain_http(cluster: Cluster, mux: Mux) -> None:
    document = chat(PREFILL, stream=True, **USAGE)
    plain = said(post(cluster.prefill, document).text)
    for answer in map(mux.answer, [ask(mux, document) for _ in range(8)]):
        assert (answer.status, answer.is_whole) == (200, True)
        assert said(answer.body.decode()) == plain


def test_an_error_is_that_of_plain_http(cluster: Cluster, mux: Mux) -> None:
    document = chat(PREFILL, model="nobody")
    plain, framed = post(cluster.prefill, document), mux.answer(ask(mux, document))
    assert (
        (framed.status, json.loads(framed.body)) == (plain.status_code, plain.json()) == (404, plain.json())
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["reset", "leave", "close"])
def test_a_client_that_leaves_ends_its_request(cluster: Cluster, mux: Mux, way: str, stream: bool) -> None:
    before = generated(cluster)
    number = ask(mux, chat("Go on", **LONG | {"stream": stream}))
    wait_for(lambda: running(cluster) == 1, "the engine to work")
    if way == "close":
        mux.socket.close()
    else:
        stays = ask(mux, chat(PREFILL, **LONG | USAGE | {"max_tokens": 100}))
        begin(mux, stays)
        mux.send(reset(number, RESET_CANCELLED) if way == "reset" else frame(LEAVE, number))
        answer = mux.answer(stays)
        assert (answer.status, answer.is_whole) == (200, True)
        assert said(answer.body.decode())[1] == 100
    wait_for(lambda: running(cluster) == 0, "its end in the engine")
    assert generated(cluster) - before < LONG["max_tokens"]


def test_a_request_is_ended_by_its_name(mux: Mux) -> None:
    number = ask(mux, chat("Go on", **LONG), **{"x-request-id": "by-name"})
    begin(mux, number)
    end = json.dumps({"request_id": "by-name"}).encode()
    assert mux.ask("POST", END_PATH, end, JSON).status == 202
    answer = mux.answer(number)
    assert answer.is_whole
    assert b'"finish_reason":"abort"' in answer.body
