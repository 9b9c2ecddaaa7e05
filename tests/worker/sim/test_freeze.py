"""An engine that stands still, one that dies of a request, and blocks that are pulled after their lease."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from orchestrator.wire.info import BEGUN_PATH
from tests.orchestrator.running import simulated
from tests.waiting import wait_for
from tests.worker.sim.asking import ask, chat, decode, prefill, text_of
from tests.worker.sim.workers import Worker, running
from worker.sim.latency import Latency

ID = {"X-Request-Id": "mine"}


def has_begun(worker: Worker) -> bool:
    return bool(worker.post(BEGUN_PATH, {"request_id": "mine"}).json()["begun"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_frozen_engine_gets_on_when_it_wakes(stream: bool) -> None:
    with running() as worker, ThreadPoolExecutor() as pool:
        expected = text_of(ask(worker, chat()))
        worker.add_fault("freeze")
        asked = pool.submit(ask, worker, chat(stream=stream), **ID)
        wait_for(lambda: worker.ledger()["in_flight"] == 1, "the request")
        assert worker.client.get("/health").status_code == 200
        assert not has_begun(worker)
        assert not asked.done()
        worker.client.delete("/sim/faults")
        answer = asked.result()
        assert answer.status_code == 200
        assert stream or text_of(answer) == expected


def test_it_says_whether_a_whole_answer_has_begun() -> None:
    with running(latency=Latency(decode_ms_per_token=50)) as worker, ThreadPoolExecutor() as pool:
        assert not has_begun(worker)
        asked = pool.submit(ask, worker, chat(max_tokens=20, ignore_eos=True), **ID)
        wait_for(lambda: has_begun(worker), "its first token")
        assert asked.result().status_code == 200
        assert not has_begun(worker)


def test_what_is_pulled_after_the_lease_is_of_another_prompt_if_it_is_to_be_as_in_vllm() -> None:
    settings = {"lease_s": 0.05, "late_pulls": "stale"}
    with running(**settings) as prefiller, running(**settings) as decoder:
        right = text_of(ask(decoder, chat()))
        handoff = prefill(prefiller, chat())
        wait_for(lambda: prefiller.ledger()["expired"] == 1, "the end of the lease")
        answer = decode(decoder, chat(), handoff)
        assert answer.status_code == 200
        assert text_of(answer) != right


@pytest.mark.processes
def test_a_worker_dies_of_a_request() -> None:
    with simulated("decode") as (worker,), httpx.Client(base_url=worker.url, timeout=60) as client:
        fault = {"kind": "die", "contains": "hemlock"}
        client.post("/sim/faults", json=fault).raise_for_status()
        path = "/v1/completions"
        assert client.post(path, json={"prompt": "water", "max_tokens": 1}).status_code == 200
        with pytest.raises(httpx.TransportError):
            client.post(path, json={"prompt": "a cup of hemlock", "max_tokens": 1})
        assert worker._process.wait(60) != 0
