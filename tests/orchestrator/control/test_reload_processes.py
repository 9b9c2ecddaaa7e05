"""Reloading for real, by one process and by several: while requests go on, in all processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes

LONG = 300  # tokens


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", "decode", options=["--decode-ms-per-token", "10"]) as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def orchestrator(tmp_path: Path, workers: list[SimWorker], request: Any) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(workers=workers[:2], processes=request.param)


def ask(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})


def reload(orchestrator: Orchestrator) -> httpx.Response:
    orchestrator.write_config()
    return httpx.post(f"{orchestrator.admin_url}/admin/reload", timeout=60, trust_env=False)


def test_a_signal_exchanges_workers_under_open_streams(
    orchestrator: Orchestrator, workers: list[SimWorker]
) -> None:
    streams = orchestrator.streams(LONG)
    orchestrator.config["models"][0]["decode"]["urls"] = [workers[2].url]
    orchestrator.write_config()
    orchestrator.signal(signal.SIGHUP)
    wait_for(lambda: "reloaded: models.0.decode.urls" in orchestrator.lines, "the reload")
    wait_for(lambda: orchestrator.worker_states().get(f"{MODEL}/decode/1") == "ready", "the new worker")
    for client in orchestrator.client_of_each():
        assert Stream(client, 1).is_whole()
    assert all(stream.is_whole() for stream in streams)
    wait_for(lambda: f"{MODEL}/decode/0" not in orchestrator.worker_states(), "the old worker's end")
    for client in orchestrator.client_of_each():
        assert ask(client).status_code == 200


def test_limits_are_those_of_the_file_in_every_process(orchestrator: Orchestrator) -> None:
    orchestrator.config["orchestrator"]["limits"] = {"max_body_bytes": 1024, "request_timeout_s": 0.001}
    answer = reload(orchestrator)
    assert answer.status_code == 200
    assert answer.json() == {
        "changed": ["orchestrator.limits.max_body_bytes", "orchestrator.limits.request_timeout_s"]
    }
    body = {"model": MODEL, "prompt": "a" * 1024}

    def is_bounded(client: httpx.Client) -> bool:
        return client.post("/v1/completions", json=body).status_code == 413

    # The channel brings the news, and one is told as soon as the other; a connection keeps its limits.
    wait_for(lambda: all(map(is_bounded, orchestrator.client_of_each())), "the limit of bodies")
    for client in orchestrator.client_of_each():
        late = client.post(
            "/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1000, "ignore_eos": True}
        )
        assert late.status_code == 504


def test_what_is_refused_changes_nothing(orchestrator: Orchestrator) -> None:
    before = orchestrator.worker_states()
    orchestrator.config["models"][0]["decode"]["urls"] = ["http://127.0.0.1:1"]
    orchestrator.config["orchestrator"]["backlog"] = 7
    answer = reload(orchestrator)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "config_refused")
    assert answer.json()["error"]["message"].endswith(": only a restart can change orchestrator.backlog")
    orchestrator.write_config("models: 1\nhealth: {interval: 2}\n")
    orchestrator.signal(signal.SIGHUP)
    wait_for(lambda: orchestrator.lines.count("not reloaded: ") == 2, "both mistakes")
    assert "did you mean 'interval_s'?" in orchestrator.lines
    assert orchestrator.worker_states() == before
    assert ask(orchestrator.client()).status_code == 200


def test_a_process_that_is_started_later_goes_by_the_new_config(
    tmp_path: Path, workers: list[SimWorker]
) -> None:
    orchestrator = Orchestrator(tmp_path, workers[:2])
    try:
        orchestrator.wait_ready()
        orchestrator.config["models"][0]["decode"]["urls"] = [worker.url for worker in workers[1:]]
        orchestrator.config["orchestrator"]["limits"] = {"max_body_bytes": 1024}
        assert reload(orchestrator).status_code == 200
        for process in orchestrator.serving():
            kill(process["pid"])
        wait_for(lambda: len(orchestrator.serving()) == 2, "other processes")
        for client in orchestrator.client_of_each():
            assert ask(client).status_code == 200
            body = {"model": MODEL, "prompt": "a" * 1024}
            assert client.post("/v1/completions", json=body).status_code == 413
    finally:
        orchestrator.clean_up()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid), "its end")
