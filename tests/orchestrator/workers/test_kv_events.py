"""Batches of KV events are applied once and in order; what is missing is asked for, and else told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from orchestrator.routing.policies.base import CacheEvent, Cleared, Followed, Removed, Stored
from orchestrator.wire.info import KvEventsInfo, WorkerInfo
from orchestrator.wire.kv_events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, encoded
from orchestrator.workers import kv_events
from orchestrator.workers.cache_alarm import CacheAlarm
from orchestrator.workers.figures import CacheFigures
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.kv_events import KvEventFeeds, Numbered, reachable
from tests.orchestrator.cluster import registry_of
from worker.sim.kv_events import KvEvents


def batch(number: int, *events: Any, made: float = 1_000.0) -> bytes:
    return encoded(Batch(made, list(events) or [BlockRemoved([number], medium="GPU")], 0))


class Heard:
    """What a policy is told."""

    def __init__(self, capacity: int = 64) -> None:
        self.now = 1_000.0
        self.events: list[CacheEvent] = []
        self.numbered = Numbered(self.events.append, lambda: self.now, lambda: capacity)

    def take(self, *numbers: int) -> list[bool]:
        return [self.numbered.take(number, batch(number)) for number in numbers]

    @property
    def removed(self) -> list[Any]:
        return [event.hashes[0] for event in self.events if isinstance(event, Removed)]

    @property
    def is_exact(self) -> bool | None:
        told = [event.is_exact for event in self.events if isinstance(event, Followed)]
        return told[-1] if told else None

    @property
    def cleared(self) -> int:
        return sum(isinstance(event, Cleared) for event in self.events)


# --- in order, and once -------------------------------------------------------------------------


def test_batches_from_the_first_on_tell_all() -> None:
    heard = Heard()
    assert heard.take(0, 1, 2) == [True] * 3
    assert heard.removed == [0, 1, 2]
    assert heard.is_exact is True


def test_what_comes_twice_counts_once() -> None:
    heard = Heard()
    heard.take(0, 1, 2)
    assert heard.take(1, 2, 0, 3) == [True] * 4
    assert heard.removed == [0, 1, 2, 3]
    assert heard.cleared == 0


def test_a_gap_is_filled_with_what_the_worker_still_has() -> None:
    heard = Heard()
    heard.take(0, 1)
    assert heard.take(4) == [False]
    assert heard.numbered.asks_from() == 1
    assert heard.numbered.fill([(number, batch(number)) for number in (1, 2, 3, 4)])
    heard.numbered.force(4, batch(4))
    assert heard.removed == [0, 1, 2, 3, 4]
    assert heard.is_exact is True
    assert (heard.numbered.gaps, heard.numbered.unfilled) == (1, 0)


@pytest.mark.parametrize("answer", [None, [(3, batch(3))]])
def test_a_gap_that_cannot_be_filled_is_told(answer: Any) -> None:
    heard = Heard()
    heard.take(0, 1)
    assert heard.take(4) == [False]
    heard.numbered.fill(answer)
    heard.numbered.force(4, batch(4))
    assert heard.removed[-1] == 4
    assert heard.is_exact is False
    assert heard.numbered.unfilled == 1


def test_what_was_missed_matters_until_the_whole_cache_was_stored_anew_or_cleared() -> None:
    for events in ([BlockStored([1, 2, 3, 4], None, [7] * 64, 16)], [AllBlocksCleared()]):
        heard = Heard(capacity=64)
        heard.take(0)
        heard.numbered.force(5, batch(5))
        heard.numbered.take(6, batch(6, BlockStored([9], None, [7] * 16, 16)))
        assert heard.is_exact is False
        heard.numbered.take(7, batch(7, *events))
        assert heard.is_exact is True


def test_who_begins_late_knows_a_part_only() -> None:
    heard = Heard()
    assert heard.take(7) == [False]
    assert heard.numbered.fill([(number, batch(number)) for number in (5, 6, 7)])
    heard.numbered.force(7, batch(7))
    assert heard.removed == [5, 6, 7]
    assert heard.is_exact is False
    fresh = Heard()
    assert fresh.numbered.fill([])
    assert fresh.is_exact is True


def test_a_publisher_that_begins_anew_has_an_empty_cache() -> None:
    heard = Heard()
    heard.take(0, 1, 2)
    assert heard.numbered.take(0, batch(70))
    assert heard.cleared == 1
    assert heard.removed == [0, 1, 2, 70]
    assert heard.is_exact is True


def test_one_that_has_begun_anew_and_is_further_is_recognised_by_what_it_repeats() -> None:
    heard = Heard()
    heard.take(0, 1, 2)
    assert heard.take(9) == [False]
    assert not heard.numbered.fill([(number, batch(70 + number)) for number in range(2, 10)])
    assert heard.numbered.asks_from() == 0
    assert heard.numbered.fill([(number, batch(70 + number)) for number in range(10)])
    assert heard.cleared == 1
    assert heard.removed[3:] == list(range(70, 80))
    assert heard.is_exact is True


def test_one_that_has_begun_anew_and_is_idle_repeats_nothing() -> None:
    heard = Heard()
    heard.numbered.fill([(0, batch(0)), (1, batch(1))])
    assert not heard.numbered.fill([])
    assert heard.numbered.fill([])
    assert heard.cleared == 1


def test_silence_is_told_and_forgotten_when_nothing_was_missed() -> None:
    heard = Heard()
    heard.take(0, 1)
    heard.numbered.fill(None)
    assert heard.is_exact is False
    heard.numbered.fill([(1, batch(1))])
    assert heard.is_exact is True
    assert heard.numbered.unfilled == 0


def test_late_batches_are_told_whatever_the_clocks_say() -> None:
    heard = Heard()
    heard.now += 3_600.0  # another machine's clock
    heard.take(0, 1)
    assert heard.is_exact is True
    heard.now += kv_events.LATE_S + 1
    heard.take(2)
    assert heard.is_exact is False
    heard.now -= kv_events.LATE_S
    heard.take(3)
    assert heard.is_exact is True
    assert heard.numbered.late == 1


# --- what cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode([1.0, [{"type": "Unheard"}]]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["text"]}]]),
        msgspec.msgpack.encode([1.0, [7]]),
        encoded(Batch(1.0, [BlockStored([1], None, [1 << 40] * 16, 16)])),
        encoded(Batch(1.0, [BlockStored([1], None, [1] * 16, 16, extra_keys=[["a"], ["b"]])])),
    ],
)
def test_a_batch_that_cannot_be_read_is_counted_and_missing(payload: bytes) -> None:
    heard = Heard()
    heard.take(0)
    assert heard.numbered.take(1, payload)
    assert heard.take(2) == [True]
    assert heard.removed == [0, 2]
    assert heard.is_exact is False
    assert heard.numbered.garbage == 1


def test_events_as_arrays_are_read_too() -> None:
    heard = Heard()
    events = [
        ["BlockStored", [1], None, [5] * 16, 16, None, "GPU"],
        ["BlockRemoved", [b"1"]],
        ["AllBlocksCleared"],
    ]
    assert heard.numbered.take(0, msgspec.msgpack.encode([1.0, events, 0]))
    kinds = [type(event) for event in heard.events]
    assert kinds == [Stored, Removed, Cleared, Followed]


def test_other_media_and_groups_of_layers_are_left_out() -> None:
    heard = Heard()
    events = [
        BlockRemoved([1], medium="CPU"),
        BlockStored([1], None, [5] * 16, 16, medium="STORAGE"),
        BlockRemoved([1], medium="GPU", group_idx=1),
        BlockStored([1], None, [5] * 64, 16, medium="GPU", group_idx=0),  # of four blocks one is cached
    ]
    assert heard.numbered.take(0, batch(0, *events))
    assert [type(event) for event in heard.events] == [Followed]


def test_extra_keys_become_salts() -> None:
    heard = Heard()
    stored = BlockStored([1, 2], None, [5] * 32, 16, lora_name="a", extra_keys=[["a", "salt"], ["a"]])
    plain = BlockStored([3, 4], 2, [5] * 32, 16, extra_keys=[None, None])
    heard.numbered.take(0, batch(0, stored, plain))
    assert [event.salts for event in heard.events if isinstance(event, Stored)] == [["a\0salt", "a"], None]


def test_endpoints_are_reached_at_the_worker() -> None:
    assert reachable("tcp://*:5557", "10.0.0.1") == "tcp://10.0.0.1:5557"
    assert reachable("tcp://[::]:5557", "fd00::1") == "tcp://[fd00::1]:5557"
    assert reachable("tcp://10.0.0.9:5557", "10.0.0.1") == "tcp://10.0.0.9:5557"
    assert reachable("ipc:///tmp/a", "10.0.0.1") == "ipc:///tmp/a"


# --- over ZeroMQ --------------------------------------------------------------------------------


class Site:
    """One prefill worker whose events are published here, and feeds that hear them."""

    def __init__(self, tmp_path: Any, *, replays: bool = True) -> None:
        self.endpoint = f"ipc://{tmp_path}/events"
        self.replay = f"ipc://{tmp_path}/again" if replays else None
        self.told: list[CacheEvent] = []
        self.registry = registry_of({"prefill": 1})
        self.worker = self.registry.workers[0]
        self.feeds = KvEventFeeds(self.registry, lambda worker: self._hear)

    def _hear(self, name: str, event: CacheEvent) -> None:
        assert name == self.worker.name
        self.told.append(event)

    def announce(self, info: KvEventsInfo | None) -> None:
        announced = WorkerInfo(
            role="prefill", model="m", decodes=["json"], engine="sim", engine_version="0", kv_events=info
        )
        self.registry.announce(self.worker, Introduction(announced, None))

    def publisher(self) -> KvEvents:
        return KvEvents(self.endpoint, self.replay, 100)

    def figures(self) -> CacheFigures:
        return self.feeds.figures(self.worker.name)

    async def wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # feeds tell nobody
                await asyncio.sleep(0.005)

    def stored(self) -> int:
        return sum(isinstance(event, Stored) for event in self.told)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def store(publisher: KvEvents, block: int) -> None:
    publisher.stored([bytes([block]) * 16], 0, [block] * 16, 16, "")


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "IDLE_S", 0.1)
    monkeypatch.setattr(kv_events, "REPLAY_S", 0.3)
    monkeypatch.setattr(kv_events, "RETRY_S", 0.05)


def test_what_was_published_before_is_heard_too(tmp_path: Any) -> None:
    async def scenario() -> None:
        site, publisher = Site(tmp_path), Site(tmp_path).publisher()
        async with publisher.publishing():
            store(publisher, 1)
            await asyncio.sleep(0)
            store(publisher, 2)
            site.announce(KvEventsInfo(site.endpoint, site.replay))
            await site.wait(lambda: site.stored() == 2)
            store(publisher, 3)
            await site.wait(lambda: site.stored() == 3)
            assert site.figures()._replace(batches=0, gaps=0) == CacheFigures(following=1)
            await site.feeds.aclose()

    run(scenario())


def test_a_restart_is_noticed_and_the_worker_heard_again(tmp_path: Any) -> None:
    async def scenario() -> None:
        site = Site(tmp_path)
        site.announce(KvEventsInfo(site.endpoint, site.replay))
        first, second = site.publisher(), site.publisher()
        async with first.publishing():
            for block in range(3):
                store(first, block)
                await asyncio.sleep(0)
            await site.wait(lambda: site.stored() == 3)
        await site.wait(lambda: site.figures().approximate == 1)
        async with second.publishing():
            store(second, 9)
            await site.wait(lambda: site.stored() == 4)
            await site.wait(lambda: site.figures().following == 1)
            assert site.figures().restarts == 1
            assert sum(isinstance(event, Cleared) for event in site.told) == 1
            await site.feeds.aclose()

    run(scenario())


def test_foreign_messages_are_counted_and_do_no_harm(tmp_path: Any) -> None:
    async def scenario() -> None:
        site = Site(tmp_path, replays=False)
        site.announce(KvEventsInfo(site.endpoint, None))
        with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(site.endpoint)
            number, good = 0, encoded(Batch(time.time(), [BlockStored([1], None, [5] * 16, 16)]))
            while site.figures().garbage < 3:
                for frames in ([b""], [b"", b"short", good], [b"", b"x" * 8, good, b"more"], [b"t"]):
                    await socket.send_multipart(frames)
                await asyncio.sleep(0.01)
            while not site.stored():
                await socket.send_multipart([b"", number.to_bytes(8, "big"), good])
                number += 1
                await asyncio.sleep(0.01)
            await site.feeds.aclose()

    run(scenario())


def test_an_endpoint_that_is_none_is_told_and_tried_again(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        site = Site(tmp_path)
        site.announce(KvEventsInfo("nonsense", None))
        await site.wait(lambda: "cannot be heard" in caplog.text)
        assert site.figures() == CacheFigures(approximate=1)
        site.announce(KvEventsInfo(site.endpoint, site.replay))
        publisher = site.publisher()
        async with publisher.publishing():
            await site.wait(lambda: site.figures().following == 1)
            await site.feeds.aclose()

    run(scenario())


def test_workers_that_announce_nothing_and_workers_that_leave(tmp_path: Any) -> None:
    async def scenario() -> None:
        site = Site(tmp_path)
        site.announce(None)
        assert site.figures() == CacheFigures(approximate=1)
        site.announce(KvEventsInfo(site.endpoint, site.replay))
        assert site.figures() == CacheFigures()
        site.registry.remove(site.worker)
        site.registry.settle()
        assert site.registry.workers == ()
        site.feeds.settle()
        assert not site.feeds._feeds
        await site.feeds.aclose()

    run(scenario())


# --- what the log says --------------------------------------------------------------------------


def test_the_log_says_each_thing_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_of({"prefill": 2})
    alarm, worker = CacheAlarm(registry), registry.workers[0]
    caplog.set_level("INFO")
    bad = CacheFigures(
        prompt_tokens=100, wrong_tokens=80, expected_tokens=80, missed_tokens=80, distrusting=1
    )
    for figures in (CacheFigures(following=1), bad, bad, CacheFigures(approximate=2), bad, bad):
        worker.note_cache_figures(figures)
        alarm.look()
        alarm.look()
    worker.note_cache_figures(CacheFigures(following=1))
    alarm.look()
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in told] == ["m/prefill/0"] * len(told)
    assert sum("100 % of the tokens" in line for line in told) == 2
    assert sum("counts again" in line for line in told) == 2
    assert sum("KV events are missing" in line for line in told) == 1
