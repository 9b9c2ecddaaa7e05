"""A simulated worker whose connections carry many requests, and faults of such a connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator.wire.streams import RESET_BROKEN, FrameError
from tests.waiting import wait_for
from tests.worker.frames import Answer, Mux, Refused
from tests.worker.sim.asking import chat, completion
from tests.worker.sim.workers import Worker, running
from worker.sim.settings import Announced

STREAM = {"stream": True, "max_tokens": 6, "ignore_eos": True}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def _worker() -> Iterator[Worker]:
    with running(announced=Announced(streams="mux")) as worker:
        yield worker


@pytest.fixture
def worker(_worker: Worker) -> Iterator[Worker]:
    yield _worker
    wait_for(lambda: listens(_worker), "the worker to listen")
    _worker.client.delete("/sim/faults")
    wait_for(lambda: _worker.ledger()["in_flight"] == 0, "the end of all requests")


def connect(worker: Worker) -> Mux:
    parts = urlsplit(worker.url)
    return Mux((str(parts.hostname), int(parts.port or 0)))


def listens(worker: Worker) -> bool:
    try:
        return httpx.get(f"{worker.url}/health").is_success  # not by a connection that was spared
    except httpx.TransportError:
        return False


@pytest.fixture
def mux(worker: Worker) -> Iterator[Mux]:
    with connect(worker) as mux:
        yield mux


def post(mux: Mux, document: dict[str, Any]) -> int:
    path = "/v1/chat/completions" if "messages" in document else "/v1/completions"
    return mux.open("POST", path, json.dumps(document).encode(), JSON)


def ask(mux: Mux, document: dict[str, Any]) -> Answer:
    return mux.answer(post(mux, document))


def add(worker: Worker, kind: str, **fields: Any) -> None:
    worker.add_fault(kind, count=1, **fields)


def tokens_in(answer: Answer) -> int:
    return answer.body.count(b'"text":')


def test_it_announces_and_takes_streams(worker: Worker, mux: Mux) -> None:
    assert worker.client.get("/baton/info").json()["streams"] == ["http", "mux"]
    answer = ask(mux, chat())
    assert (answer.status, answer.is_whole) == (200, True)
    answer = ask(mux, completion(**STREAM))
    assert tokens_in(answer) == 6
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("announced", [Announced(), Announced(streams="mux", is_plain=True)])
def test_others_take_none(announced: Announced) -> None:
    with running(announced=announced) as worker:
        with pytest.raises(Refused) as refused:
            connect(worker)
        assert refused.value.status == 404


def test_a_key_is_asked_for() -> None:
    with running(announced=Announced(streams="mux"), api_keys=("secret",)) as worker:
        with pytest.raises(Refused) as refused:
            connect(worker)
        assert refused.value.status == 401


@pytest.mark.parametrize("at_token", [None, 2])
@pytest.mark.parametrize(("kind", "fields"), [("reset", {}), ("truncate", {"clean": False})])
def test_a_stream_is_reset_and_others_go_on(
    worker: Worker, mux: Mux, at_token: int | None, kind: str, fields: dict[str, Any]
) -> None:
    add(worker, "stall", seconds=0.2, at_token=1)
    other = post(mux, completion(**STREAM))
    wait_for(lambda: worker.ledger()["requests"][-1]["outcome"] == "fault: stall", "the other stream")
    add(worker, kind, at_token=at_token, **fields)
    struck = ask(mux, completion(**STREAM))
    assert struck.reset == RESET_BROKEN
    assert (struck.status, tokens_in(struck)) == ((0, 0) if at_token is None else (200, 2))
    assert tokens_in(mux.answer(other)) == 6


def test_a_whole_connection_is_reset(worker: Worker, mux: Mux) -> None:
    add(worker, "stall", at_token=1)
    other = post(mux, completion(**STREAM))
    wait_for(lambda: worker.ledger()["requests"][-1]["outcome"] == "fault: stall", "the other stream")
    add(worker, "reset", at_token=1, connection=True)
    post(mux, completion(**STREAM))
    assert mux.read_to_end()
    assert not mux.answers[other].is_over


def test_a_clean_looking_end(worker: Worker, mux: Mux) -> None:
    add(worker, "truncate", at_token=2)
    answer = ask(mux, completion(**STREAM))
    assert (answer.is_whole, tokens_in(answer)) == (True, 2)


def test_half_a_whole_answer(worker: Worker, mux: Mux) -> None:
    add(worker, "truncate", at_token=1, clean=False)
    answer = ask(mux, completion())
    assert answer.reset == RESET_BROKEN
    assert 0 < len(answer.body) < int(answer.headers["content-length"])


def test_garbage_instead_of_a_frame_ends_the_connection(worker: Worker, mux: Mux) -> None:
    add(worker, "garbage")
    post(mux, completion(**STREAM))
    with pytest.raises(FrameError, match="unknown kind"):
        mux.read_to_end()


def test_garbage_in_a_body(worker: Worker, mux: Mux) -> None:
    add(worker, "garbage", at_token=1)
    answer = ask(mux, completion(**STREAM))
    assert answer.is_whole
    assert b"\xff\xfe" in answer.body


def test_while_it_refuses_connections_are_reset(worker: Worker, mux: Mux) -> None:
    add(worker, "stall", at_token=1)
    post(mux, completion(**STREAM))
    wait_for(lambda: worker.ledger()["requests"][-1]["outcome"] == "fault: stall", "the stream")
    worker.add_fault("refuse", seconds=0.1)
    assert mux.read_to_end()


def test_a_refusal_that_is_asked_for_by_a_stream_spares_its_connection(worker: Worker, mux: Mux) -> None:
    fault = json.dumps({"kind": "refuse", "seconds": 0.1}).encode()
    assert mux.answer(mux.open("POST", "/sim/faults", fault, JSON)).status == 200
    assert ask(mux, chat()).status == 200
