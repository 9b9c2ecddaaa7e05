"""A request that is ended by its name is answered, and nothing stays behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from orchestrator.wire.info import END_PATH
from tests.contract.engines import ASK_PINNED, events
from tests.waiting import wait_for
from tests.worker.sim.asking import ask, chat, completion
from tests.worker.sim.workers import Worker, running
from worker.sim.latency import Latency

NAME = {"x-request-id": "the-one"}
SLOW_PREFILL = Latency(prefill_us_per_token=1e9)
SLOW_DECODE = Latency(decode_ms_per_token=20)


def end(worker: Worker, name: str = NAME["x-request-id"]) -> None:
    answer = httpx.post(worker.url + END_PATH, json={"request_id": name})
    assert (answer.status_code, answer.content) == (202, b"")


def ended(worker: Worker, document: dict[str, Any], started: str) -> httpx.Response:
    """The answer to a request that is ended once this count of the ledger, or this metric, has risen."""

    def has_started() -> bool:
        return bool(worker.ledger()[started]) if ":" not in started else worker.metric(started) > 2

    with ThreadPoolExecutor() as threads:
        answer = threads.submit(lambda: ask(worker, document, **NAME))
        wait_for(has_started, "the request to run")
        end(worker)
        return answer.result()


def assert_at_rest(worker: Worker) -> None:
    ledger = worker.ledger()
    assert (ledger["in_flight"], ledger["blocks_used"], ledger["pins"]) == (0, 0, [])
    assert ledger["requests"][-1]["outcome"] == "ended"


@pytest.mark.parametrize("document", [chat(), completion()])
def test_a_prefill_that_is_ended_pins_nothing_and_says_so(document: dict[str, Any]) -> None:
    with running(latency=SLOW_PREFILL) as worker:
        answer = ended(worker, document | {"kv_transfer_params": ASK_PINNED}, "running").json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["abort"]
        assert answer["kv_transfer_params"] is None
        assert_at_rest(worker)


def test_a_queued_request_is_ended() -> None:
    with running(latency=SLOW_PREFILL, max_num_seqs=1) as worker, ThreadPoolExecutor() as threads:
        first = threads.submit(lambda: ask(worker, chat("first"), **{"x-request-id": "first"}))
        wait_for(lambda: worker.ledger()["running"] == 1, "the first to run")
        assert ended(worker, chat("second"), "waiting").json()["choices"][0]["finish_reason"] == "abort"
        end(worker, "first")
        assert first.result().status_code == 200
        assert_at_rest(worker)


@pytest.mark.parametrize("make", [chat, completion])
def test_a_stream_that_is_ended_ends_as_one(make: Any) -> None:
    with running(latency=SLOW_DECODE) as worker:
        document = make(max_tokens=100_000, ignore_eos=True, stream=True)
        told = events(ended(worker, document, "vllm:generation_tokens_total"))
        assert [event["choices"][0]["finish_reason"] for event in told][-2:] == [None, "abort"]
        assert_at_rest(worker)


def test_a_stream_that_is_ended_before_its_first_event_ends_as_one() -> None:
    with running(latency=SLOW_PREFILL) as worker:
        told = events(ended(worker, chat(stream=True), "running"))
        assert [event["choices"][0]["finish_reason"] for event in told] == [None, "abort"]
        assert told[0]["choices"][0]["delta"]["role"] == "assistant"
        assert_at_rest(worker)


def test_what_is_unknown_is_no_error() -> None:
    with running() as worker:
        assert ask(worker, chat(), **NAME).status_code == 200
        end(worker)
        end(worker, "nobody")
        assert worker.ledger()["requests"][-1]["outcome"] == "done"


def test_bad_input_gets_an_error() -> None:
    with running() as worker:
        answer = httpx.post(worker.url + END_PATH, content=b"[]")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "Expected `object`, got `array`"
