"""Clients that hardly read, for real: they are cut off, their work ends, and nobody else notices."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

MORE_THAN_FITS = 200_000  # tokens: some 40 MB, several times what the kernel buffers
LIMIT_S = 2.0
RECEIVE_BUFFER = 4096  # bytes
MOST_RECEIVED = 1_000_000  # bytes: far above what that buffer holds, far below what the other side's does


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as made:
        yield made


@pytest.fixture
def orchestrator(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=1, limits={"client_write_timeout_s": LIMIT_S})


def slow_client(orchestrator: Orchestrator) -> socket.socket:
    """Has asked for a long stream, and read the first byte."""
    body = {
        "model": MODEL,
        "prompt": "Go on",
        "max_tokens": MORE_THAN_FITS,
        "ignore_eos": True,
        "stream": True,
    }
    content = json.dumps(body).encode()
    host, port = orchestrator.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    client.connect((host, int(port)))
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    )
    assert client.recv(1) == b"H"
    return client


def running_on(worker: SimWorker) -> float:
    """Requests, as the worker itself counts them."""
    lines = httpx.get(f"{worker.url}/metrics", trust_env=False).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running")
    )


def received_by(client: socket.socket) -> int:
    """Bytes that the client's own side had when the connection was reset, which it must have been."""
    received = 0
    while True:
        try:
            piece = client.recv(65536)
        except ConnectionResetError:
            return received
        assert piece, "the connection has ended as that of a whole answer would"
        received += len(piece)


def test_a_client_that_reads_a_few_bytes_is_cut_off_and_its_work_ends(
    orchestrator: Orchestrator, workers: list[SimWorker]
) -> None:
    decode = workers[1]
    with slow_client(orchestrator) as client:
        wait_for(lambda: running_on(decode) == 1, "the decode leg")

        def has_ended() -> bool:
            client.recv(1)
            assert Stream(orchestrator.client(), tokens=10).is_whole()  # others are served as ever
            return running_on(decode) == 0

        wait_for(has_ended, "the end of the decode leg")
        wait_for(lambda: set(orchestrator.worker_loads().values()) == {0}, "leases to be given back")
        wait_for(lambda: "is cut off: it took" in orchestrator.lines, "the line that says so")
        # It cannot be taken for a whole answer, and the kernel keeps none of it for the client to fetch.
        assert received_by(client) < MOST_RECEIVED
