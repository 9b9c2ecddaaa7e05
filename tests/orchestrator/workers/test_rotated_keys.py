"""A worker's key changes while it serves: real workers and orchestrators, of one process and of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

REQUESTS = 40
ASK = {"model": MODEL, "prompt": "Go on", "max_tokens": 3}


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "prefill", "decode", "decode") as found:
        yield found


@pytest.fixture
def start(workers: list[SimWorker], tmp_path: Path) -> Iterator[Callable[..., Orchestrator]]:
    with starting(tmp_path, workers) as made:
        yield made


def rekey(worker: SimWorker, *keys: str) -> None:
    fault = {"kind": "rekey", "keys": keys}
    assert httpx.post(f"{worker.url}/sim/faults", json=fault, trust_env=False).status_code == 200


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_request_fails_and_the_reason_is_told(
    role: str, processes: int, workers: list[SimWorker], start: Callable[..., Orchestrator]
) -> None:
    orchestrator = start(processes=processes)
    name = f"{MODEL}/{role}/0"
    victim = next(worker for worker in workers if worker.role == role)
    clients = orchestrator.client_of_each()
    rekey(victim, "another")
    try:
        for number in range(REQUESTS):
            answer = clients[number % processes].post("/v1/completions", json=ASK)
            assert answer.status_code == 200, answer.text
        wait_for(lambda: orchestrator.worker_states()[name] == "unfit", "the worker to be out of service")

        def is_told() -> bool:
            found = [client.get("/ready").json().get("workers") for client in clients]
            return found == [{name: "unfit: it refuses the orchestrator's key (401)"}] * processes

        wait_for(is_told, "all processes to say why")
        [line] = [line for line in orchestrator.lines.splitlines() if "WARNING" in line and name in line]
        assert "401" in line
        assert "BATON_WORKER_API_KEY" in line
    finally:
        rekey(victim)
    wait_for(lambda: orchestrator.worker_states()[name] == "ready", "the worker to be back")
    assert clients[0].post("/v1/completions", json=ASK).status_code == 200
