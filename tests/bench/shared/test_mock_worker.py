from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from bench.shared.bodies import small_chat
from bench.shared.mock_answers import PREFILL_MARK, STREAM_MARK, _holds
from bench.shared.processes import free_port, python, running
from orchestrator.wire.info import WorkerInfo
from orchestrator.wire.streams import END, PING, UPGRADE_PATH, VERSION, frame

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def worker() -> Iterator[httpx.Client]:
    port = free_port()
    with (
        running(python("-m", "bench.shared.mock_worker", "--port", str(port), "--events", "3"), port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        yield client


def counts(worker: httpx.Client) -> dict[str, int]:
    found: dict[str, int] = worker.get("/mock/counts").json()
    return found


def test_announces_every_encoding_to_baton(worker: httpx.Client) -> None:
    info = msgspec.json.decode(worker.get("/baton/info").content, type=WorkerInfo)
    assert set(info.decodes) == {"json", "orjson", "msgpack"}
    assert set(info.streams) == {"http", "mux"}


def test_a_connection_is_upgraded_and_then_carries_frames(worker: httpx.Client) -> None:
    ask = b"GET %s HTTP/1.1\r\nhost: worker\r\nconnection: Upgrade\r\nupgrade: %s\r\n\r\n"
    port = worker.base_url.port
    assert port is not None
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        connection.makefile("rb") as read,
    ):
        connection.sendall(ask % (UPGRADE_PATH.encode(), VERSION))
        assert read.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        assert dict(line.strip().split(b": ") for line in iter(read.readline, b"\r\n"))[b"upgrade"] == VERSION
        connection.sendall(frame(PING, 0, b"12345678"))
        assert read.read(17) == frame(PING | END, 0, b"12345678")


def test_counts_answers_and_events(worker: httpx.Client) -> None:
    before = counts(worker)
    worker.post("/v1/chat/completions", content=small_chat())
    stream = worker.post("/v1/chat/completions", content=small_chat(stream=True))
    after = counts(worker)
    assert stream.text.count('"content"') == 3
    assert {key: after[key] - before[key] for key in after} == {"requests": 2, "events": 3}


def test_prefill_leg_gets_a_hand_off(worker: httpx.Client) -> None:
    leg = small_chat(kv_transfer_params={"do_remote_decode": True})
    assert "kv_transfer_params" in worker.post("/v1/chat/completions", content=leg).json()


@pytest.mark.parametrize(
    ("body", "is_found"),
    [
        (b'{"stream":true,' + b" " * 9000, True),
        (b" " * 9000 + b'"stream": true}', True),
        (b" " * 9000 + b'"stream":true' + b" " * 9000, False),  # in a client's text
        (b" " * 9000 + b"\xa6stream\xc3", True),
    ],
)
def test_marks_are_looked_for_at_the_edges_of_a_body(body: bytes, is_found: bool) -> None:
    assert _holds(body, STREAM_MARK) is is_found
    assert not _holds(body, PREFILL_MARK)
