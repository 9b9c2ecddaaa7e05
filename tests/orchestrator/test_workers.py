from __future__ import annotations

import pytest

from orchestrator.routing.least_loaded import LeastLoaded
from orchestrator.rows import Rows
from orchestrator.telemetry import Layout
from orchestrator.wire.codec import CODECS, JSON
from orchestrator.wire.info import Encoding, WorkerInfo
from orchestrator.workers import Registry, Standing, Worker, WorkerState
from tests.orchestrator.cluster import address, names, registry_of


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


# --- several processes --------------------------------------------------------------------------


def processes_of(count: int) -> list[Registry]:
    """Registries over the same two decode workers, as processes have them."""
    addresses = [address("decode", index) for index in range(2)]
    rows = Rows.create(Layout(["m"], []), len(addresses), 1 + count)
    made = [Registry(addresses, ["m"], "json", rows.loads(row)) for row in range(1, 1 + count)]
    rows.close()
    for registry in made:
        for worker in registry.workers:
            registry.mark_ready(worker)
    return made


def test_legs_are_counted_over_all_processes() -> None:
    one, two = processes_of(2)
    with one.workers[0].lease(), two.workers[0].lease(), two.workers[1].lease() as leased:
        assert leased is two.workers[1]
        for registry in (one, two):
            assert [worker.in_flight for worker in registry.workers] == [2, 1]
            assert [status.in_flight for status in registry.statuses()] == [2, 1]
    assert [worker.in_flight for worker in one.workers] == [0, 0]


def test_a_lease_that_ends_in_an_error_is_given_back_for_all() -> None:
    one, two = processes_of(2)
    with pytest.raises(ValueError, match="in the leg"), one.workers[0].lease():
        raise ValueError("in the leg")
    assert two.workers[0].in_flight == 0


def test_least_loaded_goes_around_what_other_processes_load() -> None:
    busy, *others = processes_of(3)
    with busy.workers[0].lease():
        chosen = [LeastLoaded().choose(registry.pools["m"].decode) for registry in others]
    assert names(chosen) == ["decode/1", "decode/1"]


def test_what_another_process_knows_is_taken_over() -> None:
    source = registry_of({"prefill": 1, "decode": 1}, transport="msgpack", ready=False)
    copy = registry_of({"prefill": 1, "decode": 1}, transport="msgpack", ready=False)
    source.announce(source.workers[0], info("json", "msgpack"), 4096)
    source.mark_ready(source.workers[0])
    source.mark_gone(source.workers[1], "silent")
    adopt(copy, source)
    assert copy.standings() == source.standings()
    assert names(copy.pools["m"].prefill) == ["prefill/0"]
    assert copy.workers[0].codec is CODECS["msgpack"]


def adopt(copy: Registry, source: Registry) -> None:
    for worker, standing in zip(copy.workers, source.standings(), strict=True):
        copy.adopt(worker, standing)


def test_a_standing_from_before_a_refusal_does_not_bring_the_worker_back() -> None:
    source, copy = registry_of({"decode": 1}), registry_of({"decode": 1}, ready=False)
    adopt(copy, source)
    copy.mark_gone(copy.workers[0], "refused")
    adopt(copy, source)
    assert copy.workers[0].state is WorkerState.GONE
    source.mark_gone(source.workers[0], "refused elsewhere")
    source.mark_ready(source.workers[0])
    adopt(copy, source)
    assert copy.workers[0].state is WorkerState.READY


def test_taking_over_is_no_report() -> None:
    source, copy = registry_of({"decode": 1}), registry_of({"decode": 1})
    gone: list[Worker] = []
    copy.on_gone(gone.append)
    source.mark_gone(source.workers[0], "refused")
    adopt(copy, source)
    assert names(copy.pools["m"].decode) == []
    assert gone == []


def test_every_change_is_told() -> None:
    registry = registry_of({"decode": 1}, ready=False)
    worker = registry.workers[0]
    seen: list[tuple[Standing, ...]] = []
    registry.on_change(lambda: seen.append(registry.standings()))
    registry.announce(worker, None, 4096)
    registry.mark_ready(worker)
    registry.mark_gone(worker, "refused")
    registry.mark_gone(worker, "still refused")
    told = [(standing.state, standing.max_model_len, standing.last_error) for [standing] in seen]
    assert told == [
        ("starting", 4096, None),
        ("ready", 4096, None),
        ("gone", 4096, "refused"),
        ("gone", 4096, "still refused"),
    ]
