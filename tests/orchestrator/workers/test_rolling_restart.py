"""All workers are restarted, one after the other, while requests are under way: none of these fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

ROLES = ("prefill", "prefill", "decode", "decode")
CLIENTS = 32
TOKENS = 60
WORK = ["--prefill-us-per-token", "200", "--decode-ms-per-token", "10"]


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated(*ROLES, options=WORK) as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def orchestrator(
    tmp_path: Path, workers: list[SimWorker], request: pytest.FixtureRequest
) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=request.param)


class Load:
    """Clients that ask again and again while this is entered: half of them for streams."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._clients = [orchestrator.client() for _ in range(CLIENTS)]
        self._is_over = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS)
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> Load:
        for number, client in enumerate(self._clients):
            self._threads.submit(self._keep_asking, client, self._stream if number % 2 else self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._threads.shutdown()

    def wait_more(self, count: int) -> None:
        """Until so many more have been answered."""
        enough = self.answered + count
        wait_for(lambda: self.answered >= enough, "answers")

    def _keep_asking(self, client: httpx.Client, ask: Callable[[httpx.Client], str | None]) -> None:
        while not self._is_over.is_set():
            try:
                failure = ask(client)
            except Exception as error:  # whatever it is, it is a failed request
                failure = repr(error)
            if failure is not None:
                self.failures.append(failure)
            self.answered += 1

    def _ask(self, client: httpx.Client) -> str | None:
        body = {"model": MODEL, "prompt": "Go on " * 10, "max_tokens": TOKENS, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        return None if answer.status_code == 200 else answer.text

    def _stream(self, client: httpx.Client) -> str | None:
        return None if Stream(client, TOKENS).is_whole() else "a stream that is not whole"


def names() -> list[str]:
    """Of the workers, as the orchestrator calls them."""
    return [f"{MODEL}/{role}/{ROLES[:place].count(role)}" for place, role in enumerate(ROLES)]


def pins(worker: SimWorker) -> list[Any]:
    pinned: list[Any] = httpx.get(f"{worker.url}/sim/ledger").json()["pins"]
    return pinned


def retried(orchestrator: Orchestrator) -> float:
    counters = orchestrator.counters()
    return sum(value for (name, _), value in counters.items() if name == "baton_upstream_retries_total")


def test_a_rolling_restart_of_all_workers_fails_no_request(
    orchestrator: Orchestrator, workers: list[SimWorker]
) -> None:
    with Load(orchestrator) as load:
        for name, worker in zip(names(), workers, strict=True):
            load.wait_more(CLIENTS)
            orchestrator.change("POST", f"/admin/workers/{name}/drain")
            orchestrator.client_of_each()  # a process that has answered has heard of it before
            wait_for(lambda name=name: orchestrator.worker_loads()[name] == 0, f"{name} to be free")
            # What it has prefilled may still have to be pulled, by legs of others.
            wait_for(lambda worker=worker: not pins(worker), f"{name} to pin nothing")
            worker.restart()
            orchestrator.change("POST", f"/admin/workers/{name}/undrain")
            wait_for(lambda name=name: orchestrator.worker_states()[name] == "ready", f"{name} to be back")
        load.wait_more(CLIENTS)
    assert load.failures == []
    assert retried(orchestrator) == 0  # there was nothing to mend
    assert set(orchestrator.worker_loads().values()) == {0}
