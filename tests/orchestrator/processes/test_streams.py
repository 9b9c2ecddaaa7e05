"""Many requests on one connection between real processes: an orchestrator's, and simulated workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

ROLES = ("prefill", "decode")
SHORT, ENDLESS = 50, 100_000  # tokens
MANY = 12  # streams, more than there are pairs of a process and a worker
MUX = {"BATON_STREAMS": "mux"}


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_STREAMS", "mux")
        with simulated(*ROLES, options=["--decode-ms-per-token", "5"]) as made:
            yield made


@pytest.fixture
def make(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Any]:
    with starting(tmp_path, workers) as start:
        yield start


def ask(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/completions", json={"model": MODEL, "prompt": "Go on", "max_tokens": 1})


def used(orchestrator: Orchestrator) -> set[str]:
    return {worker["streams"] for worker in orchestrator.admin("/admin/workers").json()}


@pytest.mark.parametrize("processes", [1, 2])
def test_streams_share_a_connection_of_each_process_to_each_worker(make: Any, processes: int) -> None:
    orchestrator = make(env=MUX, processes=processes)
    clients = orchestrator.client_of_each()
    streams = [Stream(client, ENDLESS) for client in clients for _ in range(MANY)]
    whole = [Stream(client, SHORT) for client in clients for _ in range(MANY)]
    assert all(stream.is_whole() for stream in whole)
    assert used(orchestrator) == {"mux"}
    expected = len(ROLES) * processes
    wait_for(lambda: orchestrator.gauge("baton_upstream_connections") == expected, "one of each to each")
    for stream in streams:
        stream.leave()
    wait_for(lambda: set(orchestrator.worker_loads().values()) == {0}, "legs to end")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_with_many_streams_comes_back(
    tmp_path: Path, workers: list[SimWorker], processes: int
) -> None:
    with simulated("decode") as decode, starting(tmp_path, [workers[0], *decode]) as start:
        orchestrator = start(env=MUX, processes=processes)
        client, *_ = clients = orchestrator.client_of_each()
        streams = [Stream(client, ENDLESS) for client in clients for _ in range(MANY)]
        decode[0].restart()
        assert not any(stream.is_whole() for stream in streams)
        wait_for(lambda: ask(client).status_code == 200, "the worker to serve again")
        assert Stream(client, SHORT).is_whole()
        assert used(orchestrator) == {"mux"}


@pytest.mark.parametrize("ours", ["http", "mux"])
def test_any_mix_works(
    tmp_path: Path, workers: list[SimWorker], monkeypatch: pytest.MonkeyPatch, ours: str
) -> None:
    monkeypatch.setenv("BATON_STREAMS", "http")
    with simulated("decode") as plain, starting(tmp_path, [workers[0], *plain]) as start:
        orchestrator = start(env={"BATON_STREAMS": ours})
        assert all(Stream(client, SHORT).is_whole() for client in orchestrator.client_of_each())
        assert used(orchestrator) == {"http", ours}
