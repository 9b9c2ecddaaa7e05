from __future__ import annotations

import pytest

from orchestrator.transport.base import Origin
from orchestrator.transport.memory import MemoryUpstream
from orchestrator.wire.info import Streams, WorkerInfo
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.offers import Offers
from orchestrator.workers.registry import Registry
from tests.orchestrator.cluster import address, registry_of


class Told(MemoryUpstream):
    def __init__(self) -> None:
        super().__init__()
        self.offers: list[tuple[Origin, bool, bytes]] = []

    def offer(self, origin: Origin, is_mux: bool, headers: bytes = b"") -> None:
        self.offers.append((origin, is_mux, headers))

    def taken(self) -> list[tuple[Origin, bool, bytes]]:
        offers, self.offers = self.offers, []
        return offers


def introduced(*streams: Streams) -> Introduction:
    info = WorkerInfo(
        role="decode", model="m", decodes=["json"], engine="sim", engine_version="1", streams=list(streams)
    )
    return Introduction(info, None)


@pytest.fixture
def registry() -> Registry:
    registry = Registry([address("decode", 0, port=1), address("decode", 1, port=2)], ["m"], "json")
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    return registry


@pytest.fixture
def told(registry: Registry) -> Told:
    told = Told()
    Offers(registry, told, lambda worker: b"authorization: for %b\r\n" % worker.name[-1:].encode())
    return told


def test_a_worker_is_offered_with_what_it_wants_in_the_head(registry: Registry, told: Told) -> None:
    first, second = registry.workers
    registry.announce(first, introduced("http", "mux"))
    registry.announce(second, introduced())
    assert told.taken() == [
        (first.origin, True, b"authorization: for 0\r\n"),
        (second.origin, False, b"authorization: for 1\r\n"),
    ]


def test_a_worker_is_offered_once_for_each_time_that_it_came_into_service(
    registry: Registry, told: Told
) -> None:
    worker = registry.workers[0]
    for _ in range(3):
        registry.announce(worker, introduced("mux"))
    assert [is_mux for _, is_mux, _ in told.taken()] == [True]
    registry.judge.mark_gone(worker, "refused")
    registry.judge.mark_ready(worker)
    registry.announce(worker, introduced("mux"))
    registry.announce(worker, introduced("http"))
    assert [is_mux for _, is_mux, _ in told.taken()] == [True, False]


def test_plain_vllm_is_not_offered(registry: Registry, told: Told) -> None:
    registry.announce(registry.workers[0], Introduction(None, None))
    assert [is_mux for _, is_mux, _ in told.taken()] == [False]


def test_a_process_that_follows_offers_what_it_is_told(registry: Registry) -> None:
    follower, told = Registry([worker.address for worker in registry.workers], ["m"], "json"), Told()
    Offers(follower, told, lambda worker: b"")
    registry.announce(registry.workers[1], introduced("mux"))
    for _ in range(2):
        follower.follow(registry.snapshots())
    assert [(origin, is_mux) for origin, is_mux, _ in told.taken()] == [
        (follower.workers[0].origin, False),
        (follower.workers[1].origin, True),
    ]


def test_a_worker_that_is_gone_for_good_is_withdrawn(registry: Registry, told: Told) -> None:
    worker = registry.workers[0]
    registry.announce(worker, introduced("mux"))
    told.taken()
    registry.remove(worker)
    registry.settle()
    assert told.taken() == [(worker.origin, False, b"")]


def test_a_server_that_is_several_workers_is_withdrawn_with_the_last_of_them() -> None:
    registry, told = registry_of({"prefill": 1, "decode": 1}), Told()  # both at one address
    Offers(registry, told, lambda worker: b"")
    for worker in registry.workers:
        registry.announce(worker, introduced("mux"))
    for withdrawn in ([], [False]):
        told.taken()
        registry.remove(registry.workers[0])
        registry.settle()
        assert [is_mux for _, is_mux, _ in told.taken()] == withdrawn
