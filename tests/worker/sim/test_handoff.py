"""Hand-offs between two workers over real sockets: what makes them real, and how they fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.engines import ASK_PINNED, events
from tests.waiting import wait_for
from tests.worker.sim.asking import (
    KV_ERROR,
    ask,
    cached_tokens,
    chat,
    completion,
    decode,
    prefill,
    send,
    text_of,
)
from tests.worker.sim.workers import Worker, running
from worker.sim.latency import Latency
from worker.sim.settings import Announced

MAKES = [chat, completion]
STREAMS = [False, True]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("stream", STREAMS)
def test_the_text_equals_the_aggregated_one(
    prefiller: Worker, decoder: Worker, make: Any, stream: bool
) -> None:
    document = make("What is a KV cache?", max_tokens=30)
    answer = decode(decoder, document, prefill(prefiller, document), stream=stream)
    assert text_of(answer) == text_of(ask(decoder, document)) != ""


def test_a_worker_that_listens_at_all_addresses_names_its_own(decoder: Worker) -> None:
    document = chat("What is a KV cache?")
    with running(role="prefill", host="0.0.0.0", announced=Announced(host="127.0.0.1")) as prefiller:
        handoff = prefill(prefiller, document)
        assert handoff["remote_host"] == "127.0.0.1"
        answer = decode(decoder, document, handoff)
        assert cached_tokens(answer) == handoff["remote_num_tokens"]


@pytest.mark.parametrize("make", MAKES)
def test_swapped_handoffs_give_two_wrong_answers(prefiller: Worker, decoder: Worker, make: Any) -> None:
    one, other = make("What is prefill?"), make("What is decode?")
    right = text_of(ask(decoder, one)), text_of(ask(decoder, other))
    of_one, of_other = prefill(prefiller, one), prefill(prefiller, other)
    swapped = text_of(decode(decoder, one, of_other)), text_of(decode(decoder, other, of_one))
    assert swapped == right[::-1]
    assert right[0] != right[1]


def test_the_evidence_of_a_transfer(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Evidence " * 20)
    handoff = prefill(prefiller, document)
    answer = decode(decoder, document, handoff)
    usage = answer.json()["usage"]
    assert cached_tokens(answer) == usage["prompt_tokens"] == handoff["remote_num_tokens"]
    assert usage["prompt_tokens_details"]["created_cache_tokens"] == 0


def test_a_forwarded_count_is_repeated(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Forwarded")
    handoff = prefill(prefiller, document) | {"remote_prefill_cached_tokens": 3}
    assert cached_tokens(decode(decoder, document, handoff)) == 3


def test_the_prefill_answer(prefiller: Worker, decoder: Worker) -> None:
    document = chat("The prefill answer " * 5)
    leg = document | {"max_tokens": 1, "kv_transfer_params": ASK_PINNED}
    answer = ask(prefiller, leg, **{"X-Request-Id": "mine.1"}).json()
    handoff = answer["kv_transfer_params"]
    assert answer["id"] == "chatcmpl-mine.1"
    assert handoff["remote_request_id"].startswith("chatcmpl-mine.1-")
    assert (handoff["do_remote_prefill"], handoff["do_remote_decode"]) == (True, False)
    assert handoff["remote_engine_id"] == prefiller.ledger()["engine_id"]
    (blocks,) = handoff["remote_block_ids"]
    assert len(blocks) == -(-answer["usage"]["prompt_tokens"] // 16)
    assert handoff["remote_prefill_cached_tokens"] == 0
    text_of(decode(decoder, document, handoff))


def test_streams_pin_but_do_not_tell(prefiller: Worker) -> None:
    leg = completion("Streamed prefill", max_tokens=1, stream=True, kv_transfer_params=ASK_PINNED)
    with running(lease_s=0.1) as worker:
        answer = ask(worker, leg)
        assert "kv_transfer_params" not in answer.text
        wait_for(lambda: worker.ledger()["expired"] == 1, "the lease's end")
        assert worker.metric("vllm:nixl_num_kv_expired_reqs_total") == 1


@pytest.mark.parametrize("stream", STREAMS)
def test_a_failed_completion(decoder: Worker, prefiller: Worker, stream: bool) -> None:
    document = completion("Fails")
    wrong = prefill(prefiller, document) | {"remote_engine_id": "restarted"}
    answer = decode(decoder, document, wrong, stream=stream)
    if stream:
        assert (answer.status_code, events(answer)) == (200, [KV_ERROR])
    else:
        assert (answer.status_code, answer.json()) == (500, KV_ERROR)
    ask(prefiller, completion(kv_transfer_params=wrong | {"remote_engine_id": _engine_id(prefiller)}))


@pytest.mark.parametrize("choices", [1, 2])
def test_a_failed_chat_stream_begins_with_the_role_chunks(decoder: Worker, choices: int) -> None:
    """As seen on vLLM 0.32."""
    lost = {"do_remote_prefill": True, "remote_engine_id": "gone", "remote_request_id": "gone"}
    lost |= {"remote_host": "127.0.0.1", "remote_port": 1, "remote_block_ids": [[1]]}
    *roles, error = events(decode(decoder, chat(n=choices, temperature=1, stream=True), lost))
    assert error == KV_ERROR
    deltas = [choice["delta"] for role in roles for choice in role["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}] * choices


def test_a_handoff_from_before_a_restart_fails() -> None:
    document = chat("Before the restart")
    with running() as decoder:
        with running() as before:
            handoff = prefill(before, document)
        with running() as after:
            moved = handoff | {"remote_port": prefill(after, document)["remote_port"]}
            assert decode(decoder, document, moved).status_code == 500
            assert after.ledger()["pulled"] == 0


def test_recompute_is_told_by_the_count() -> None:
    document = chat("Recompute " * 20)
    with running(load_failure_policy="recompute") as worker:
        lost = prefill(worker, document) | {"remote_engine_id": "gone"}
        answer = decode(worker, document, lost)
        usage = answer.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] // 16 * 16
        with running(load_failure_policy="recompute") as fresh:
            again = decode(fresh, document, lost)
            details = again.json()["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == 0
            assert details["created_cache_tokens"] == usage["prompt_tokens"] // 16 * 16
        assert text_of(answer) == text_of(again) == text_of(ask(worker, document))


def test_several_answers_from_one_handoff(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Two answers", temperature=0.7, seed=1, n=2)
    handoff = prefill(prefiller, document, n=1)
    said = [choice["message"]["content"] for choice in decode(decoder, document, handoff).json()["choices"]]
    alone = [choice["message"]["content"] for choice in ask(decoder, document).json()["choices"]]
    assert said == alone
    assert said[0] != said[1]


def test_token_ids_with_the_handoff(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Tokenise once " * 30)
    handoff = prefill(prefiller, document)
    ids = decoder.post("/tokenize", {"messages": document["messages"]}).json()["tokens"]
    cut = decode(decoder, chat("x"), handoff | {"prompt_token_ids": ids})
    assert text_of(cut) == text_of(ask(decoder, document))
    assert cached_tokens(cut) == len(ids)


def test_a_refused_decode_leg_releases(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Refused")
    released = prefiller.ledger()["released"]
    answer = decode(decoder, document, prefill(prefiller, document), max_tokens=0)
    assert answer.status_code == 400
    wait_for(lambda: prefiller.ledger()["released"] == released + 1, "the release")


def test_an_answer_that_is_over_at_once(prefiller: Worker, decoder: Worker) -> None:
    document = chat("Say nothing. <|eos_now|>")
    answer = decode(decoder, document, prefill(prefiller, document))
    (choice,) = answer.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_pulls_are_counted(prefiller: Worker, decoder: Worker) -> None:
    before = decoder.metric("vllm:nixl_xfer_time_seconds_count"), prefiller.ledger()["pulled"]
    document = chat("Counted")
    decode(decoder, document, prefill(prefiller, document))
    after = decoder.metric("vllm:nixl_xfer_time_seconds_count"), prefiller.ledger()["pulled"]
    assert after == (before[0] + 1, before[1] + 1)


# --- clients that leave


@pytest.mark.parametrize("stream", STREAMS)
def test_a_decode_leg_that_is_dropped_at_once_still_frees(
    prefiller: Worker, decoder: Worker, stream: bool
) -> None:
    pulled = prefiller.ledger()["pulled"] + prefiller.ledger()["released"]
    for number in range(10):
        document = chat(f"Dropped {number}")
        handoff = prefill(prefiller, document)
        send(decoder, document | {"kv_transfer_params": handoff, "stream": stream}).close()
    wait_for(lambda: prefiller.ledger()["pins"] == [], "all pins to be freed")
    ledger = prefiller.ledger()
    assert ledger["pulled"] + ledger["released"] == pulled + 10
    assert ledger["expired"] == 0
    wait_for(lambda: decoder.ledger()["in_flight"] == 0, "the decode worker to be idle")


@pytest.mark.parametrize("stream", STREAMS)
def test_leaving_while_it_is_decoded_aborts(stream: bool) -> None:
    with running(latency=Latency(decode_ms_per_token=20)) as worker:
        document = chat("Decoded slowly", max_tokens=100_000, ignore_eos=True, stream=stream)
        connection = send(worker, document)
        wait_for(lambda: worker.metric("vllm:generation_tokens_total") > 2, "some tokens")
        assert worker.metric("vllm:num_requests_running") == 1
        connection.close()
        wait_for(lambda: worker.ledger()["in_flight"] == 0, "the abort")
        assert worker.ledger()["aborted"] == 1
        assert worker.ledger()["requests"][-1]["outcome"] == "aborted"
        assert worker.metric("vllm:kv_cache_usage_perc") == 0
        assert worker.metric("vllm:request_success_total") == 1


def test_leaving_in_the_middle_of_a_prefill_frees() -> None:
    with running(latency=Latency(prefill_us_per_token=1e9)) as worker:
        connection = send(worker, chat(kv_transfer_params=ASK_PINNED))
        wait_for(lambda: worker.ledger()["running"] == 1, "the prefill to begin")
        assert worker.ledger()["blocks_used"] > 0
        connection.close()
        wait_for(lambda: worker.ledger()["in_flight"] == 0, "the abort")
        assert worker.ledger()["blocks_used"] == 0
        assert worker.ledger()["pinned"] == 0


def _engine_id(worker: Worker) -> str:
    return str(worker.ledger()["engine_id"])
