"""Adapters and aliases for real: by one process and by several, over workers that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with (
        simulated("prefill", "decode") as plain,
        simulated("prefill", "decode", options=["--adapter", "sql"]) as having,
    ):
        yield [*plain, *having]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def orchestrator(tmp_path: Path, workers: list[SimWorker], request: Any) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=request.param)


def ask(client: httpx.Client, name: str) -> httpx.Response:
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return client.post("/v1/chat/completions", json=body)


def names(client: httpx.Client) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"]]


def test_adapters_follow_their_workers_and_aliases_the_config(
    orchestrator: Orchestrator, workers: list[SimWorker]
) -> None:
    clients = orchestrator.client_of_each()
    for client in clients:
        wait_for(lambda client=client: names(client) == [MODEL, "sql"], "the adapter")
        # One of its two workers lists it already; the other one may have to be probed yet.
        wait_for(lambda client=client: ask(client, "sql").status_code != 503, "both workers that have it")
        for _ in range(4):  # a worker without it would answer 404
            answer = ask(client, "sql")
            assert (answer.status_code, answer.json()["model"]) == (200, "sql")
            assert answer.headers["x-baton-path"] == "disaggregated"
        assert ask(client, "gpt-4").status_code == 404

    orchestrator.config["aliases"] = {"gpt-4": MODEL}
    orchestrator.write_config()
    reloaded = httpx.post(f"{orchestrator.admin_url}/admin/reload", timeout=60, trust_env=False)
    assert reloaded.json() == {"changed": ["aliases"]}
    for client in clients:
        wait_for(lambda client=client: ask(client, "gpt-4").status_code == 200, "the alias")
        answer = ask(client, "gpt-4")
        assert answer.json()["model"] == MODEL  # as the worker has it
        assert names(client) == [MODEL, "sql", "gpt-4"]

    workers[3].kill()
    for client in clients:
        wait_for(lambda client=client: ask(client, "sql").status_code == 503, "the end of its decode worker")
        assert ask(client, MODEL).status_code == 200
