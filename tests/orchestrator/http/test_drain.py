"""The end of an orchestrator, of one process and of several: what clients and load balancers see of it."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes

STEP_MS = 10  # a stream takes at least so long per token
LONG, ENDLESS = 400, 100_000  # tokens
NEVER_S = 600


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", options=["--decode-ms-per-token", str(STEP_MS)]) as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def make(tmp_path: Path, workers: list[SimWorker], request: Any) -> Iterator[Any]:
    with starting(tmp_path, workers) as start:
        yield functools.partial(start, processes=request.param)


def ask(client: httpx.Client) -> httpx.Response:
    body = {"model": MODEL, "prompt": "What is prefill?", "max_tokens": 1}
    return client.post("/v1/completions", json=body)


def drain(orchestrator: Orchestrator) -> None:
    orchestrator.signal(signal.SIGTERM)
    wait_drain(orchestrator)


def wait_drain(orchestrator: Orchestrator) -> None:
    wait_for(lambda: orchestrator.lines.count("draining:") == orchestrator.count, "the drain")


def test_open_requests_end_well_and_new_ones_are_refused(make: Any) -> None:
    orchestrator = make()
    known = orchestrator.client_of_each()
    streams = orchestrator.streams(LONG)
    drain(orchestrator)
    for client in (*known, orchestrator.client()):
        answer = ask(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
    ready, health = (orchestrator.client().get(path) for path in ("/ready", "/health"))
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert orchestrator.worker_loads()[f"{MODEL}/decode/0"] == len(streams)  # the admin listener is there
    assert all(stream.is_whole() for stream in streams)
    assert orchestrator.wait_exit() == 0
    assert orchestrator.left() == set()


def test_a_signal_to_the_whole_group_is_one_drain(make: Any) -> None:
    """As `baton up` and systemd send it: then no process is to be followed by another."""
    orchestrator = make()
    streams = orchestrator.streams(LONG)
    os.killpg(orchestrator.process.pid, signal.SIGTERM)
    wait_drain(orchestrator)
    answer = ask(orchestrator.client())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert all(stream.is_whole() for stream in streams)
    assert orchestrator.wait_exit() == 0
    assert orchestrator.left() == set()


def test_nothing_to_wait_for(make: Any) -> None:
    orchestrator = make(timeout_graceful_shutdown=NEVER_S)
    orchestrator.client_of_each()  # idle connections
    orchestrator.signal(signal.SIGTERM)
    assert orchestrator.wait_exit() == 0


def test_what_outlasts_the_grace_time_ends_with_an_error(make: Any) -> None:
    orchestrator = make(timeout_graceful_shutdown=1)
    streams = orchestrator.streams(ENDLESS)
    orchestrator.signal(signal.SIGTERM)
    assert {stream.error_code() for stream in streams} == {"shutting_down"}
    assert orchestrator.wait_exit() == 0


def test_the_second_signal_ends_at_once(make: Any) -> None:
    orchestrator = make(timeout_graceful_shutdown=NEVER_S)
    streams = orchestrator.streams(ENDLESS)
    drain(orchestrator)
    orchestrator.signal(signal.SIGTERM)
    assert orchestrator.wait_exit() == 0
    assert not any(stream.is_whole() for stream in streams)
    assert orchestrator.left() == set()


def test_notice_is_given_before_requests_are_refused(make: Any) -> None:
    orchestrator = make(timeout_graceful_shutdown=NEVER_S, drain_notice_s=NEVER_S)
    drain(orchestrator)
    assert orchestrator.readiness() == "draining"
    answer = ask(orchestrator.client())
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    orchestrator.signal(signal.SIGTERM)
    assert orchestrator.wait_exit() == 0


def test_clients_do_not_notice_that_one_process_of_several_is_terminated(
    tmp_path: Path, workers: list[SimWorker]
) -> None:
    orchestrator = Orchestrator(tmp_path, workers)
    try:
        orchestrator.wait_ready()
        clients, streams = orchestrator.client_of_each(), orchestrator.streams(LONG)
        ended = orchestrator.serving()[0]["pid"]
        os.kill(ended, signal.SIGTERM)

        def has_ended() -> bool:
            assert all(ask(client).status_code == 200 for client in clients)
            return not is_running(ended)

        wait_for(has_ended, "the end of the process")
        assert all(stream.is_whole() for stream in streams)
        assert len(orchestrator.serving()) == 2
    finally:
        orchestrator.clean_up()
