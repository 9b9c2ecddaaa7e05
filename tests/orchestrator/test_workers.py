from __future__ import annotations

import pytest

from orchestrator.wire.codec import CODECS, JSON
from orchestrator.wire.info import Encoding, WorkerInfo
from orchestrator.workers import Registry, Worker
from tests.orchestrator.cluster import names, registry_of


def test_only_ready_workers_are_in_the_pools() -> None:
    registry = registry_of({"prefill": 2, "decode": 1, "both": 1}, ready=False)
    pools = registry.pools["m"]
    assert (pools.prefill, pools.decode, pools.both) == ((), (), ())
    for worker in registry.workers:
        registry.mark_ready(worker)
    assert names(pools.prefill) == ["prefill/0", "prefill/1"]
    assert names(pools.decode) == ["decode/0"]
    assert names(pools.both) == ["both/0"]
    registry.mark_gone(registry.workers[0], "refused")
    assert names(pools.prefill) == ["prefill/1"]


def test_a_worker_that_goes_is_told_of_once_and_may_come_back() -> None:
    registry = registry_of({"prefill": 1})
    gone: list[Worker] = []
    registry.on_gone(gone.append)
    worker = registry.workers[0]
    for why in ("refused", "still refused"):
        registry.mark_gone(worker, why)
    assert gone == [worker]
    assert worker.status().last_error == "still refused"
    registry.mark_ready(worker)
    assert (worker.status().state, worker.status().last_error) == ("ready", None)


def test_a_worker_that_never_answered_stays_starting() -> None:
    registry = registry_of({"prefill": 1}, ready=False)
    registry.mark_gone(registry.workers[0], "refused")
    assert registry.workers[0].state == "starting"


def test_a_lease_counts_for_as_long_as_it_is_held() -> None:
    worker = registry_of({"decode": 1}).workers[0]
    with worker.lease(), worker.lease():
        assert worker.in_flight == 2
    with pytest.raises(RuntimeError, match="boom"), worker.lease():
        raise RuntimeError("boom")
    assert worker.in_flight == 0


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({"prefill": 1, "decode": 1}, None),
        ({"both": 1}, None),
        ({"prefill": 1}, "no decode worker is ready"),
        ({"decode": 1}, "no prefill worker is ready"),
        ({}, "no prefill and no decode worker is ready"),
    ],
)
def test_a_model_is_whole_with_a_pair_or_a_worker_that_does_both(
    counts: dict[str, int], problem: str | None
) -> None:
    assert registry_of(counts).pools["m"].problem() == problem  # type: ignore[arg-type]


def info(*decodes: Encoding) -> WorkerInfo:
    return WorkerInfo(role="decode", model="m", decodes=list(decodes), engine="vllm", engine_version="0")


@pytest.mark.parametrize(
    ("transport", "announced", "used"),
    [
        ("msgpack", info("json", "msgpack"), "msgpack"),
        ("msgpack", info("json"), "json"),
        ("msgpack", info("json", "orjson"), "json"),
        ("msgpack", None, "json"),
        ("json", info("json", "msgpack"), "json"),
        ("orjson", info("json", "msgpack"), "json"),
    ],
)
def test_a_worker_gets_what_both_sides_can(transport: str, announced: WorkerInfo | None, used: str) -> None:
    registry: Registry = registry_of({"decode": 1}, transport=transport)
    registry.announce(registry.workers[0], announced, 4096)
    assert registry.workers[0].codec is CODECS[used]
    assert registry.workers[0].status().max_model_len == 4096


def test_json_until_announced() -> None:
    assert registry_of({"decode": 1}, transport="msgpack").workers[0].codec is JSON
