"""Seats and the queue with real processes and simulated workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

ENDLESS = 100_000  # tokens: the stream lasts until its client leaves


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", options=["--decode-ms-per-token", "20"]) as made:
        yield made


@pytest.fixture
def orchestrator(
    tmp_path: Path, workers: list[SimWorker], request: pytest.FixtureRequest
) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(**request.param)


def ask(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/completions", json={"model": MODEL, "prompt": "Go on", "max_tokens": 2})


@pytest.mark.parametrize(
    "orchestrator", [{"processes": 1, "seats": 1, "queue": {"requests": 1}}], indirect=True
)
def test_one_waits_and_the_next_is_sent_away(orchestrator: Orchestrator) -> None:
    stream = Stream(orchestrator.client(), ENDLESS)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(ask, orchestrator.client())
        wait_for(lambda: orchestrator.gauge("baton_queue_requests") == 1, "a request in the queue")
        refused = ask(orchestrator.client())
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_busy"
        assert int(refused.headers["retry-after"]) >= 1
        stream.leave()
        assert waiting.result().status_code == 200
    assert orchestrator.gauge("baton_queue_requests") == 0
    reason = (("reason", "queue_full"),)
    assert orchestrator.counters()["baton_requests_rejected_total", reason] == 1


@pytest.mark.parametrize(
    "orchestrator", [{"processes": 2, "seats": 2, "queue": {"requests": 0}}], indirect=True
)
def test_each_process_has_its_share_of_the_seats(orchestrator: Orchestrator) -> None:
    clients = orchestrator.client_of_each()
    streams = [Stream(client, ENDLESS) for client in clients]
    assert ask(orchestrator.client()).status_code == 429
    for stream in streams:
        stream.leave()
    wait_for(lambda: ask(orchestrator.client()).status_code == 200, "a seat")
