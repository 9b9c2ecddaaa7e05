"""Pushes between two workers over real sockets: both legs at once, in either order, and how they fail.

Most leases here are endless: what must fail at once would else only fail when they are over.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest

from bench.shared.processes import free_port
from orchestrator.wire.info import END_PATH
from tests.contract.engines import events
from tests.waiting import wait_for
from tests.worker.sim.asking import KV_ERROR, ask, cached_tokens, chat, completion, path_of, send, text_of
from tests.worker.sim.workers import Worker, running
from worker.sim.latency import Latency

MAKES = [chat, completion]
STREAMS = [False, True]
LEGS = ["prefill", "decode"]
MANY = 100
ENDLESS_S = 100_000.0
SLOW_PREFILL = Latency(prefill_us_per_token=1e9)
ERRORS = "vllm:nixl_num_failed_transfers_total"


class Push:
    """One transfer: its legs, sent from threads of their own."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.id = uuid.uuid4().hex
        self.prefill_params: dict[str, Any] = {
            "transfer_mode": "push",
            "transfer_id": self.id,
            "do_remote_decode": True,
            "do_remote_prefill": False,
        }
        self.decode_params: dict[str, Any] = {
            "transfer_mode": "push",
            "transfer_id": self.id,
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_host": "127.0.0.1",
            "remote_port": site.port,
        }

    def prefill_leg(self, document: dict[str, Any]) -> dict[str, Any]:
        fields = {"max_tokens": 1, "ignore_eos": True, "kv_transfer_params": self.prefill_params}
        return document | fields

    def decode_leg(self, document: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return document | {"kv_transfer_params": self.decode_params} | fields

    def prefill(self, document: dict[str, Any]) -> Future[httpx.Response]:
        leg = self.prefill_leg(document)
        return self.site.threads.submit(lambda: ask(self.site.prefiller, leg, **{"x-request-id": self.id}))

    def decode(self, document: dict[str, Any], **fields: Any) -> Future[httpx.Response]:
        leg = self.decode_leg(document, **fields)
        return self.site.threads.submit(lambda: ask(self.site.decoder, leg))

    def wait_prefilled(self) -> None:
        wait_for(lambda: self.site.prefiller.ledger()["pins"], "the prefill leg to wait")

    def wait_decoder(self) -> None:
        """Its decode leg waits for the KV cache. (Only if there is no other one.)"""
        wait_for(lambda: self.site.decoder.metric("vllm:num_requests_kv_fetch_by_stage"), "the decode leg")


class Site:
    """A prefill worker at a side channel `port`, and a decode worker."""

    def __init__(self, prefiller: Worker, decoder: Worker, port: int, threads: ThreadPoolExecutor) -> None:
        self.prefiller = prefiller
        self.decoder = decoder
        self.port = port
        self.threads = threads

    def assert_at_rest(self) -> None:
        for worker in (self.prefiller, self.decoder):
            ledger = wait_for(lambda worker=worker: _idle(worker), "an idle worker")  # type: ignore[misc]
            assert (ledger["pins"], ledger["blocks_used"]) == ([], 0)
            assert ledger["pinned"] == ledger["pushed"] + ledger["released"] + ledger["expired"]


def _idle(worker: Worker) -> dict[str, Any] | None:
    ledger = worker.ledger()
    return None if ledger["in_flight"] else ledger


@contextmanager
def site(*, prefill: dict[str, Any] | None = None, **settings: Any) -> Iterator[Site]:
    """`prefill`: settings of that worker only. At the end nothing is left of any transfer."""
    settings = {"lease_s": ENDLESS_S} | settings
    port = free_port()
    with (
        ThreadPoolExecutor(2 * MANY) as threads,
        running(**settings) as decoder,
        running(**settings | {"side_channel_port": port} | (prefill or {})) as prefiller,
    ):
        here = Site(prefiller, decoder, port, threads)
        yield here
        here.assert_at_rest()


@pytest.fixture(scope="module")
def _shared() -> Iterator[Site]:
    with site() as here:
        yield here


@pytest.fixture
def push(_shared: Site) -> Iterator[Push]:
    """A transfer between two workers that are shared by tests that leave nothing behind."""
    yield Push(_shared)
    for worker in (_shared.prefiller, _shared.decoder):
        worker.client.delete("/sim/faults")
    _shared.assert_at_rest()


def assert_failed(answer: httpx.Response, *, stream: bool = False) -> None:
    if stream:
        assert events(answer)[-1] == KV_ERROR
    else:
        assert (answer.status_code, answer.json()) == (500, KV_ERROR)


# --- what goes well


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("first", LEGS)
def test_the_text_equals_the_aggregated_one(push: Push, make: Any, stream: bool, first: str) -> None:
    document = make("What is a KV cache?", max_tokens=30)
    if first == "prefill":
        prefilled = push.prefill(document)
        push.wait_prefilled()
        decoded = push.decode(document, stream=stream)
    else:
        decoded = push.decode(document, stream=stream)
        push.wait_decoder()
        prefilled = push.prefill(document)
    assert text_of(decoded.result()) == text_of(ask(push.site.decoder, document)) != ""
    assert prefilled.result().status_code == 200


@pytest.mark.parametrize("make", MAKES)
def test_both_legs_tell(push: Push, make: Any) -> None:
    document = make("Evidence " * 20)
    prefilled, decoded = push.prefill(document), push.decode(document)
    answer = prefilled.result().json()
    assert answer["kv_transfer_params"] is None
    assert answer["usage"]["completion_tokens"] == 1
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"]
    usage = decoded.result().json()["usage"]
    assert cached_tokens(decoded.result()) == usage["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert not usage["prompt_tokens_details"]["created_cache_tokens"]  # a completion does not tell


def test_the_kv_cache_is_the_prefill_workers(push: Push) -> None:
    """Else nothing would show that one request got another one's."""
    one, other = chat("What is prefill?"), chat("What is decode?")
    prefilled, decoded = push.prefill(one), push.decode(other)
    assert text_of(decoded.result()) == text_of(ask(push.site.decoder, one))
    assert prefilled.result().status_code == 200


def test_the_prefill_leg_is_answered_when_nothing_is_pinned(push: Push) -> None:
    before = push.site.prefiller.ledger()
    document = chat("Counted")
    prefilled = push.prefill(document)
    push.wait_prefilled()
    assert push.site.prefiller.ledger()["sending"] == 1
    assert not prefilled.done()
    decoded = push.decode(document)
    prefilled.result()
    after = push.site.prefiller.ledger()
    assert (after["pins"], after["blocks_used"], after["sending"]) == ([], 0, 0)
    assert (after["pinned"], after["pushed"]) == (before["pinned"] + 1, before["pushed"] + 1)
    assert decoded.result().status_code == 200


def test_transfers_are_counted_where_pulls_are(push: Push) -> None:
    decoder = push.site.decoder
    names = "vllm:nixl_xfer_time_seconds_count", "vllm:external_prefix_cache_hits_total"
    before = [decoder.metric(name) for name in names]
    document = completion([7] * 33)
    prefilled, decoded = push.prefill(document), push.decode(document)
    assert prefilled.result().status_code == decoded.result().status_code == 200
    after = [decoder.metric(name) for name in names]
    assert after == [before[0] + 1, before[1] + 33]


def test_several_answers_from_one_transfer(push: Push) -> None:
    document = chat("Two answers", temperature=0.7, seed=1)
    prefilled, decoded = push.prefill(document), push.decode(document, n=2)
    assert prefilled.result().status_code == 200
    said = [choice["message"]["content"] for choice in decoded.result().json()["choices"]]
    alone = ask(push.site.decoder, document | {"n": 2}).json()["choices"]
    assert said == [choice["message"]["content"] for choice in alone]


def test_a_streamed_prefill_leg_waits_as_well(push: Push) -> None:
    document = completion("Streamed prefill")
    prefilled, decoded = push.prefill(document | {"stream": True}), push.decode(document)
    assert [event["choices"][0]["finish_reason"] for event in events(prefilled.result())][-1] == "length"
    assert text_of(decoded.result()) == text_of(ask(push.site.decoder, document))


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_codecs(codec: str) -> None:
    with site(transport=codec) as here:
        push, document = Push(here), chat("In any form")
        prefilled = here.threads.submit(_ask_in, codec, here.prefiller, push.prefill_leg(document))
        decoded = here.threads.submit(_ask_in, codec, here.decoder, push.decode_leg(document))
        assert prefilled.result().status_code == 200
        assert cached_tokens(decoded.result()) == prefilled.result().json()["usage"]["prompt_tokens"]
        bad = push.decode_leg(document)
        del bad["kv_transfer_params"]["transfer_id"]
        assert _ask_in(codec, here.decoder, bad).status_code == 400


def _ask_in(codec: str, worker: Worker, document: dict[str, Any]) -> httpx.Response:
    if codec == "json":
        return ask(worker, document)
    headers = {"content-type": "application/json", "x-msgpack": "1"}
    body = msgspec.msgpack.encode(document)
    return worker.client.post(path_of(document), content=body, headers=headers)


def test_a_transfer_takes_its_time() -> None:
    with site(latency=Latency(transfer_us_per_token=1000)) as here:
        push, document = Push(here), completion([7] * 50)
        prefilled, decoded = push.prefill(document), push.decode(document)
        assert prefilled.result().status_code == decoded.result().status_code == 200
        assert here.decoder.metric("vllm:nixl_xfer_time_seconds_sum") > 0.049  # timers are of whole ms


def test_who_waits_for_a_decode_worker_takes_no_seat() -> None:
    with site(prefill={"max_num_seqs": 1}) as here:
        waiting, document = Push(here), chat("No seat")
        prefilled = waiting.prefill(document)
        waiting.wait_prefilled()
        assert ask(here.prefiller, chat("Another one")).status_code == 200
        decoded = waiting.decode(document)
        assert prefilled.result().status_code == decoded.result().status_code == 200


# --- the prefill leg fails


@pytest.mark.parametrize("stream", STREAMS)
def test_a_prefill_leg_that_is_closed_while_it_is_computed(stream: bool) -> None:
    with site(prefill={"latency": SLOW_PREFILL}) as here:
        push, document = Push(here), chat("Never computed")
        decoded = push.decode(document, stream=stream)
        connection = send(here.prefiller, push.prefill_leg(document))
        wait_for(lambda: here.prefiller.ledger()["running"], "the prefill")
        connection.close()
        assert_failed(decoded.result(), stream=stream)
        assert here.decoder.metric(ERRORS) == 1
        assert here.decoder.ledger()["requests"][-1]["outcome"].startswith("kv lost: ")


def test_a_prefill_leg_that_is_closed_while_it_waits(push: Push) -> None:
    document = chat("Closed")
    connection = send(push.site.prefiller, push.prefill_leg(document))
    push.wait_prefilled()
    released = push.site.prefiller.ledger()["released"]
    connection.close()
    wait_for(lambda: not push.site.prefiller.ledger()["pins"], "the blocks to be freed")
    assert push.site.prefiller.ledger()["released"] == released + 1
    assert_failed(push.decode(document).result())


@pytest.mark.parametrize("waits", [False, True])
def test_a_prefill_leg_that_is_ended(waits: bool) -> None:
    with site(prefill={} if waits else {"latency": SLOW_PREFILL}) as here:
        push, document = Push(here), chat("Ended")
        if not waits:
            decoded = push.decode(document)
        prefilled = push.prefill(document)
        wait_for(lambda: here.prefiller.ledger()["sending" if waits else "running"], "the prefill")
        httpx.post(here.prefiller.url + END_PATH, json={"request_id": push.id}).raise_for_status()
        assert prefilled.result().json()["choices"][0]["finish_reason"] == "abort"
        assert_failed((push.decode(document) if waits else decoded).result())


def test_a_queued_decode_leg_fails_as_soon_as_its_prefill_leg_does() -> None:
    with site(max_num_seqs=1, prefill={"latency": SLOW_PREFILL}) as here:
        push, other, document = Push(here), Push(here), chat("Queued")
        kept = other.decode(document)
        other.wait_decoder()
        decoded = push.decode(document)
        wait_for(lambda: here.decoder.ledger()["waiting"], "the queue")
        connection = send(here.prefiller, push.prefill_leg(document))
        wait_for(lambda: here.prefiller.ledger()["running"], "the prefill")
        connection.close()
        assert_failed(decoded.result())
        assert not kept.done()
        send(here.prefiller, other.prefill_leg(document)).close()
        assert_failed(kept.result())


def test_a_prefill_worker_that_stops() -> None:
    document = chat("Restarted")
    with site() as here:
        port = free_port()
        with running(side_channel_port=port, lease_s=ENDLESS_S) as before:
            push = Push(Site(before, here.decoder, port, here.threads))
            decoded = push.decode(document)
            push.wait_decoder()
        assert_failed(decoded.result())
        assert_failed(push.decode(document).result())
        with running(side_channel_port=port, lease_s=ENDLESS_S) as after:
            again = Push(Site(after, here.decoder, port, here.threads))
            prefilled, decoded = again.prefill(document), again.decode(document)
            assert prefilled.result().status_code == decoded.result().status_code == 200


@pytest.mark.parametrize("leg", LEGS)
def test_injected_loss(push: Push, leg: str) -> None:
    document = chat("Injected")
    worker = push.site.prefiller if leg == "prefill" else push.site.decoder
    worker.add_fault("kv_lost", leg=leg, count=1)
    prefilled, decoded = push.prefill(document), push.decode(document)
    assert_failed(decoded.result())
    if leg == "prefill":
        assert_failed(prefilled.result())
    else:
        assert push.decode(document).result().status_code == prefilled.result().status_code == 200


# --- the decode leg fails


@pytest.mark.parametrize("stream", STREAMS)
def test_a_decode_leg_that_leaves_can_be_replaced(push: Push, stream: bool) -> None:
    document = chat("Left")
    connection = send(push.site.decoder, push.decode_leg(document, stream=stream))
    push.wait_decoder()
    connection.close()
    wait_for(lambda: not push.site.decoder.ledger()["in_flight"], "the abort")
    prefilled = push.prefill(document)
    push.wait_prefilled()
    decoded = push.decode(document)
    assert prefilled.result().status_code == decoded.result().status_code == 200


def test_a_decode_leg_that_leaves_in_the_middle_of_the_transfer() -> None:
    with site(prefill={"latency": Latency(transfer_us_per_token=5000)}) as here:
        push, document = Push(here), completion([7] * 50)
        prefilled = push.prefill(document)
        push.wait_prefilled()
        connection = send(here.decoder, push.decode_leg(document))
        push.wait_decoder()
        connection.close()
        wait_for(lambda: not here.decoder.ledger()["in_flight"], "the abort")
        assert not prefilled.done()
        assert push.decode(document).result().status_code == prefilled.result().status_code == 200


def test_a_decode_leg_that_is_refused_leaves_the_transfer_to_others(push: Push) -> None:
    document = chat("Refused")
    prefilled = push.prefill(document)
    push.wait_prefilled()
    assert push.decode(document, max_tokens=0).result().status_code == 400
    assert push.site.prefiller.ledger()["pins"]
    assert push.decode(document).result().status_code == prefilled.result().status_code == 200


# --- leases


def test_a_prefill_leg_that_nobody_takes() -> None:
    with site(prefill={"lease_s": 0.1}) as here:
        push, document = Push(here), chat("Expired")
        assert_failed(push.prefill(document).result())
        ledger = here.prefiller.ledger()
        assert (ledger["expired"], ledger["pins"], ledger["blocks_used"]) == (1, [], 0)
        assert here.prefiller.metric("vllm:nixl_num_kv_expired_reqs_total") == 1
        assert ledger["requests"][-1]["outcome"].startswith("kv lost: ")
        assert_failed(push.decode(document).result())
        assert here.prefiller.metric("vllm:nixl_num_notifications_after_expiry_total") == 1


@pytest.mark.parametrize("stream", STREAMS)
def test_a_prefill_leg_that_never_comes(stream: bool) -> None:
    with site(lease_s=0.1) as here:
        push, document = Push(here), chat("Nobody comes")
        assert_failed(push.decode(document, stream=stream).result(), stream=stream)
        assert here.prefiller.ledger()["unknown"] == 0


def test_a_decode_side_waits_for_longer_than_a_lease_while_the_prefill_is_computed() -> None:
    with site(lease_s=2.5, prefill={"latency": Latency(prefill_us_per_token=80_000)}) as here:
        push, document = Push(here), completion([7] * 50)  # 4 s
        prefilled, decoded = push.prefill(document), push.decode(document)
        assert prefilled.result().status_code == decoded.result().status_code == 200


def test_recompute_is_told_by_the_count() -> None:
    with site(load_failure_policy="recompute") as here:
        push, document = Push(here), chat("Recompute " * 20)
        send(here.prefiller, push.prefill_leg(document)).close()
        wait_for(lambda: here.prefiller.ledger()["aborted"], "the abort")
        answer = push.decode(document).result()
        assert cached_tokens(answer) == 0
        assert text_of(answer) == text_of(ask(here.decoder, document))


# --- one use


def test_a_transfer_is_good_for_one_use(push: Push) -> None:
    document = chat("Once")
    prefilled, decoded = push.prefill(document), push.decode(document)
    assert prefilled.result().status_code == decoded.result().status_code == 200
    unknown = push.site.prefiller.ledger()["unknown"]
    assert_failed(push.decode(document).result())
    assert push.site.prefiller.ledger()["unknown"] == unknown + 1
    assert_failed(push.prefill(document).result())


def test_a_second_decode_side_is_refused(push: Push) -> None:
    document = chat("Second")
    first = push.decode(document)
    push.wait_decoder()
    unknown = push.site.prefiller.ledger()["unknown"]
    assert_failed(push.decode(document).result())
    assert push.site.prefiller.ledger()["unknown"] == unknown + 1
    assert push.prefill(document).result().status_code == first.result().status_code == 200


def test_a_second_prefill_leg_is_refused(push: Push) -> None:
    document = chat("Second")
    first = push.prefill(document)
    push.wait_prefilled()
    assert_failed(push.prefill(document).result())
    assert push.decode(document).result().status_code == first.result().status_code == 200


# --- what is malformed

ABSENT = object()


@pytest.mark.parametrize(
    ("leg", "wrong"),
    [
        *[(leg, {"transfer_id": value}) for leg in LEGS for value in (ABSENT, None, 7, "", [])],
        *[("prefill", {"transfer_id": value}) for value in ("x" * 257, "a b", "a\n", "\ud800", "é")],
        *[("decode", {"remote_host": value}) for value in (ABSENT, None, 7, "")],
        *[("decode", {"remote_port": value}) for value in (ABSENT, None, "x", 0, 65536, True, 1.5)],
        *[("prefill", {"do_remote_decode": value}) for value in ("yes", False)],
        ("decode", {"do_remote_decode": True}),
    ],
)
@pytest.mark.parametrize("make", MAKES)
def test_malformed_parameters(push: Push, make: Any, leg: str, wrong: dict[str, Any]) -> None:
    worker = push.site.prefiller if leg == "prefill" else push.site.decoder
    document = make("Malformed")
    sent = push.prefill_leg(document) if leg == "prefill" else push.decode_leg(document)
    params = {**sent["kv_transfer_params"], **wrong}
    sent["kv_transfer_params"] = {key: value for key, value in params.items() if value is not ABSENT}
    answer = _ask_in_ascii(worker, sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params"
    assert ask(worker, document).status_code == 200


@pytest.mark.parametrize("host", ["no such host", "\ud800", "a\0b", "127.0.0.1"])
def test_hosts_that_cannot_be_reached(push: Push, host: str) -> None:
    push.decode_params |= {"remote_host": host, "remote_port": free_port()}
    assert_failed(_ask_in_ascii(push.site.decoder, push.decode_leg(chat("Unreachable"))))


def _ask_in_ascii(worker: Worker, document: dict[str, Any]) -> httpx.Response:
    """Lone surrogates and all."""
    headers = {"content-type": "application/json"}
    return worker.client.post(path_of(document), content=json.dumps(document), headers=headers)


def test_a_transfer_is_of_one_prompt(push: Push) -> None:
    answer = push.prefill(completion(["one", "two"])).result()
    assert answer.status_code == 400


# --- many at once


def test_many_at_once() -> None:
    """More than there are seats, and blocks to decode in, in any order."""
    latency = Latency(prefill_us_per_token=50, transfer_us_per_token=50, decode_ms_per_token=0.5)
    decode = {"max_num_seqs": 20, "num_blocks": 40, "latency": latency}
    with site(**decode, prefill={"num_blocks": 10_000}) as here:
        said = [text_of(ask(here.decoder, chat(f"Number {number}"))) for number in range(MANY)]
        pushes = [Push(here) for _ in said]
        prefills = [push.prefill(chat(f"Number {number}")) for number, push in enumerate(pushes)]
        answers = [push.decode(chat(f"Number {number}")) for number, push in enumerate(pushes)]
        assert [text_of(answer.result()) for answer in answers] == said
        assert {prefill.result().status_code for prefill in prefills} == {200}
        assert here.prefiller.ledger()["pushed"] == len(said)
