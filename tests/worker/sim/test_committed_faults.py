"""Faults as a client sees them on the wire."""

from __future__ import annotations

import json
import socket
import time
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from tests.contract.engines import events
from tests.waiting import LIMIT_S, wait_for
from tests.worker.sim.asking import ask, chat, completion, decode, prefill, send, text_of
from tests.worker.sim.workers import Worker, running
from worker.sim import faults
from worker.sim.latency import Latency
from worker.sim.settings import Announced, Defects

STREAM = {"stream": True, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def worker(decoder: Worker) -> Worker:
    return decoder


def receive(connection: socket.socket) -> bytes:
    """Everything until the end of the connection. Raises `ConnectionResetError` for RST."""
    connection.settimeout(LIMIT_S)
    with connection:
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def read_while_open(connection: socket.socket, expected: bytes) -> bytes:
    connection.settimeout(LIMIT_S)
    received = b""
    while expected not in received:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    return received


def tokens_in(received: bytes) -> int:
    return received.count(b'"text":') or received.count(b'"delta":{"content"')


def add(worker: Worker, kind: str, **fields: Any) -> None:
    worker.add_fault(kind, count=1, **fields)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_status(worker: Worker, stream: bool) -> None:
    add(worker, "error", status=429, message="busy", retry_after=7)
    answer = ask(worker, chat(stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["message"] == "busy"
    assert ask(worker, chat(stream=stream)).status_code == 200  # counted


def test_an_error_in_a_stream(worker: Worker) -> None:
    add(worker, "error", status=503, at_token=2)
    *tokens, error = events(ask(worker, completion(**STREAM)))
    assert len(tokens) == 2
    assert error["error"]["code"] == 503


def test_an_error_in_a_whole_answer_has_a_status(worker: Worker) -> None:
    add(worker, "error", status=503, at_token=2)
    assert ask(worker, completion()).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_stall_before_the_head(worker: Worker, stream: bool) -> None:
    aborted = worker.ledger()["aborted"]
    add(worker, "stall")
    connection = send(worker, chat(stream=stream))
    wait_for(lambda: worker.ledger()["requests"][-1]["outcome"] == "fault: stall", "the stall")
    connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    connection.close()
    wait_for(lambda: worker.ledger()["aborted"] == aborted + 1, "the abort")


def test_a_stall_at_a_token(worker: Worker) -> None:
    add(worker, "stall", at_token=3)
    connection = send(worker, completion(**STREAM))
    received = read_while_open(connection, b"")
    while tokens_in(received) < 3:
        received += connection.recv(65536)
    wait_for(lambda: worker.ledger()["requests"][-1]["outcome"] == "fault: stall", "the stall")
    connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    connection.close()


def test_a_short_stall_goes_on(worker: Worker) -> None:
    add(worker, "stall", at_token=3, seconds=0.01)
    assert len(text_of(ask(worker, completion(**STREAM))).split()) == 6
    add(worker, "stall", at_token=0, seconds=0.01)
    assert len(text_of(ask(worker, completion(**STREAM | {"stream": False}))).split()) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_token", [None, 1])
def test_a_reset_is_a_reset(worker: Worker, stream: bool, at_token: int | None) -> None:
    add(worker, "reset", at_token=at_token)
    with pytest.raises(ConnectionResetError):
        receive(send(worker, completion(**STREAM | {"stream": stream})))


@pytest.mark.parametrize(("at_token", "tokens"), [(0, 0), (2, 2), (-1, 6)])
def test_a_clean_looking_end_of_a_stream(worker: Worker, at_token: int, tokens: int) -> None:
    add(worker, "truncate", at_token=at_token)
    answer = ask(worker, completion(**STREAM))
    assert answer.status_code == 200
    assert answer.text.count("data: ") == tokens
    assert "[DONE]" not in answer.text


def test_a_stream_whose_framing_is_cut(worker: Worker) -> None:
    add(worker, "truncate", at_token=2, clean=False)
    received = receive(send(worker, completion(**STREAM)))
    assert tokens_in(received) == 2
    assert not received.endswith(b"0\r\n\r\n")


def test_no_answer_at_all(worker: Worker) -> None:
    add(worker, "truncate")
    assert receive(send(worker, completion())) == b""


def test_a_whole_answer_that_is_short_of_its_length(worker: Worker) -> None:
    add(worker, "truncate", at_token=1, clean=False)
    received = receive(send(worker, completion()))
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    assert 0 < len(body) < int(length.split(b":")[1])


def test_half_an_answer_in_whole_framing(worker: Worker) -> None:
    add(worker, "truncate", at_token=1)
    answer = ask(worker, completion())
    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        answer.json()


def test_garbage_instead_of_a_head(worker: Worker) -> None:
    add(worker, "garbage")
    received = receive(send(worker, completion()))
    assert received
    assert not received.startswith(b"HTTP/")


@pytest.mark.parametrize("stream", [False, True])
def test_garbage_in_a_body(worker: Worker, stream: bool) -> None:
    add(worker, "garbage", at_token=1)
    answer = ask(worker, completion(**STREAM | {"stream": stream}))
    assert answer.status_code == 200
    assert b"\xff\xfe" in answer.content
    assert b"[DONE]" not in answer.content


def test_lost_kv(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Lost")
    prefiller.add_fault("kv_lost", leg="prefill", count=1)
    assert decode(decoder, document, prefill(prefiller, document)).status_code == 500
    decoder.add_fault("kv_lost", leg="decode", count=1)
    assert decode(decoder, document, prefill(prefiller, document)).status_code == 500
    assert decode(decoder, document, prefill(prefiller, document)).status_code == 200
    wait_for(lambda: prefiller.ledger()["pins"] == [], "the releases")


def test_slowness(worker: Worker) -> None:
    add(worker, "slow", seconds=0.2)
    assert ask(worker, chat()).elapsed.total_seconds() >= 0.2


def test_a_sick_health_probe(worker: Worker) -> None:
    worker.add_fault("error", leg="health", status=503)
    assert worker.client.get("/health").status_code == 503
    assert ask(worker, chat()).status_code == 200
    worker.client.delete("/sim/faults")
    assert worker.client.get("/health").status_code == 200


def test_faults_are_shown_and_cleared(worker: Worker) -> None:
    worker.add_fault("reset", probability=0.0)
    ask(worker, chat())
    (shown,) = worker.client.get("/sim/faults").json()
    assert (shown["kind"], shown["struck"], shown["left"]) == ("reset", 0, None)
    assert worker.client.delete("/sim/faults").json() == []
    assert worker.client.post("/sim/faults", json={"kind": "fire"}).status_code == 400


def test_faults_from_the_start() -> None:
    with running(faults=(faults.Error(status=418, count=1),)) as worker:
        assert [ask(worker, chat()).status_code for _ in range(2)] == [418, 200]


def test_nobody_listens_for_a_while() -> None:
    with running(latency=Latency(decode_ms_per_token=20)) as worker:
        open_stream = send(worker, chat(max_tokens=100_000, ignore_eos=True, stream=True))
        read_while_open(open_stream, b"data: ")
        worker.add_fault("refuse", seconds=1.0)
        with pytest.raises(ConnectionResetError):
            receive(open_stream)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(_address(worker)).close()
        wait_for(lambda: _listens(worker), "the listener's return")
        assert ask(worker, chat()).status_code == 200


def _address(worker: Worker) -> tuple[str, int]:
    return worker.client.base_url.host, worker.client.base_url.port or 80


def _listens(worker: Worker) -> bool:
    try:
        socket.create_connection(_address(worker)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_keys_are_changed_while_it_runs() -> None:
    with running(api_keys=("old",)) as worker:

        def asked_with(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return worker.client.get("/v1/models", headers=headers).status_code

        assert (asked_with("old"), asked_with("new")) == (200, 401)
        assert worker.client.post("/sim/faults", json={"kind": "rekey", "keys": ["new"]}).json() == []
        assert (asked_with("old"), asked_with("new")) == (401, 200)
        assert worker.client.get("/health").status_code == 200
        worker.client.post("/sim/faults", json={"kind": "rekey"})
        assert asked_with("any") == 200


def test_a_worker_can_have_another_key_from_the_start() -> None:
    with running(faults=(faults.Rekey(keys=("other",)),)) as worker:
        assert worker.client.get("/v1/models").status_code == 401


def test_a_garbled_kv_cache_is_answered_with_other_words(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Garbled", seed=1)
    right = decode(decoder, document, prefill(prefiller, document)).json()
    decoder.add_fault("kv_garbled", leg="decode", count=1)
    wrong = decode(decoder, document, prefill(prefiller, document)).json()
    assert wrong["choices"][0]["message"] != right["choices"][0]["message"]
    assert decode(decoder, document, prefill(prefiller, document)).json()["choices"] == right["choices"]


# --- what a worker says of itself, true or not


def test_a_worker_can_be_plain() -> None:
    with running(announced=Announced(is_plain=True)) as worker:
        assert worker.client.get("/baton/info").status_code == 404
        assert worker.post("/v1/baton/end", {"request_id": "x"}).status_code == 404
        assert ask(worker, chat()).status_code == 200


def test_other_weights_answer_with_other_words(worker: Worker) -> None:
    with running(defects=Defects(weights="tuned")) as other:
        said = [ask(each, chat("Who?", seed=1)).json()["choices"] for each in (worker, other, other)]
    assert said[0] != said[1] == said[2]


@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
def test_a_wrong_clock(offset_s: float) -> None:
    with running(defects=Defects(clock_offset_s=offset_s)) as worker:
        (date,) = worker.client.get("/health").headers.get_list("date")
    assert abs(parsedate_to_datetime(date).timestamp() - time.time() - offset_s) < 60


def test_handoffs_can_name_another_port() -> None:
    with running(role="prefill", defects=Defects(advertised_port=1)) as worker:
        assert prefill(worker, chat())["remote_port"] == 1
