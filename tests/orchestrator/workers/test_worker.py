from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from orchestrator.wire.codec import CODECS, JSON
from orchestrator.wire.info import TokenIdsForm, WorkerInfo
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.states import Suspicion, WorkerState
from orchestrator.workers.worker import OwnWorker, Worker
from tests.orchestrator.cluster import address, announcement, processes_of, registry_of, seat


def worker_for(transport: str) -> Worker:
    return OwnWorker(address("decode", 0), transport, None, 0)


# --- legs ---------------------------------------------------------------------------------------


def test_a_seat_counts_for_as_long_as_it_is_held() -> None:
    worker = registry_of({"decode": 1}).workers[0]
    with seat(worker), seat(worker):
        assert worker.in_flight == 2
    with pytest.raises(RuntimeError, match="boom"), seat(worker):
        raise RuntimeError("boom")
    assert worker.in_flight == 0


def test_legs_are_counted_over_all_processes() -> None:
    one, two = processes_of(2)
    with seat(one.workers[0]), seat(two.workers[0]), seat(two.workers[1]) as taken:
        assert taken is two.workers[1]
        for registry in (one, two):
            assert [worker.in_flight for worker in registry.workers] == [2, 1]
            assert [status.in_flight for status in registry.statuses()] == [2, 1]
    assert [worker.in_flight for worker in one.workers] == [0, 0]


def test_a_seat_that_is_left_in_an_error_is_given_back_for_all() -> None:
    one, two = processes_of(2)
    with pytest.raises(ValueError, match="in the leg"), seat(one.workers[0]):
        raise ValueError("in the leg")
    assert two.workers[0].in_flight == 0


def test_a_worker_is_heard_by_all_processes() -> None:
    one, two = processes_of(2)
    one.workers[0].note_heard(1234.5)
    two.workers[0].note_heard(1233.5)
    assert [registry.workers[0].heard for registry in (one, two)] == [1234.5, 1234.5]
    assert two.workers[1].heard == 0.0


# --- what it announces --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "announced", "used"),
    [
        ("msgpack", announcement("json", "msgpack"), "msgpack"),
        ("msgpack", announcement("json"), "json"),
        ("msgpack", announcement("json", "orjson"), "json"),
        ("msgpack", None, "json"),
        ("json", announcement("json", "msgpack"), "json"),
        ("orjson", announcement("json", "msgpack"), "json"),
    ],
)
def test_a_worker_gets_what_both_sides_can(transport: str, announced: WorkerInfo | None, used: str) -> None:
    worker = worker_for(transport)
    worker.announce(Introduction(announced, 4096))
    assert worker.abilities.codec is CODECS[used]
    assert worker.status().max_model_len == 4096


def test_json_until_announced() -> None:
    assert worker_for("msgpack").abilities.codec is JSON


@pytest.mark.parametrize(
    ("transport", "announced", "used"),
    [
        ("json", ["list", "base64", "bin"], ("list",)),
        ("orjson", ["list", "base64", "bin"], ("base64", "list")),
        ("msgpack", ["list", "base64", "bin"], ("bin", "base64", "list")),
        ("msgpack", ["list"], ("list",)),
        ("msgpack", [], ()),
    ],
)
def test_token_ids_go_in_the_best_form_that_both_sides_know(
    transport: str, announced: list[TokenIdsForm], used: tuple[str, ...]
) -> None:
    worker = worker_for(transport)
    worker.announce(Introduction(announcement("json", token_ids=announced), None))
    assert worker.abilities.token_ids == used


def test_who_refused_what_it_announced_gets_plain_json_until_it_is_back() -> None:
    worker = worker_for("msgpack")
    said = announcement("json", "msgpack", token_ids=["bin"])
    worker.announce(Introduction(said, 4096))
    worker.distrust()
    for _ in range(2):
        assert (worker.abilities.codec, worker.abilities.token_ids) == (JSON, ())
        assert (worker.introduction.info, worker.introduction.max_model_len) == (said, 4096)
        worker.announce(Introduction(said, 4096))  # a probe that was under way
    worker.become(replace(worker.life(), epoch=worker.epoch + 1))
    worker.announce(Introduction(said, 4096))
    assert (worker.abilities.codec, worker.abilities.token_ids) == (CODECS["msgpack"], ("bin",))


# --- what happens to it -------------------------------------------------------------------------


def test_a_worker_becomes_what_it_is_told() -> None:
    worker = worker_for("json")
    life = replace(
        worker.life(),
        state=WorkerState.SUSPECT,
        epoch=3,
        failures=2,
        suspicion=Suspicion(ejections=1, doubted=5.0),
        warm_from=4.0,
        credit=0.5,
    )
    worker.become(life)
    assert worker.life() == life
    assert (worker.state, worker.epoch, worker.failures) == ("suspect", 3, 2)
    told = worker.snapshot()
    assert (told.state, told.epoch, told.warm_from) == ("suspect", 3, 4.0)


def test_it_tells_what_it_is() -> None:
    worker = worker_for("json")
    with seat(worker):
        assert repr(worker) == "<OwnWorker m/decode/0 starting in_flight=1>"


def test_the_zone_of_the_config_comes_before_the_announced_one() -> None:
    registry = registry_of({"decode": 2})
    one, other = registry.workers
    other.address = replace(other.address, zone="a")
    info = structs.replace(announcement("json"), zone="b")
    for worker in (one, other):
        worker.announce(Introduction(info, None))
    assert (one.zone, other.zone) == ("b", "a")
    one.announce(Introduction(None, None))
    assert one.zone is None
