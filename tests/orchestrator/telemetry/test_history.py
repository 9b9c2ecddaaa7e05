from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import Raw

from orchestrator.telemetry.history import CLIENT_GONE, KEPT, KEPT_LONG, LONG_S, History
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.record import Attempts, FailedAttempt, RequestRecord, Trail
from tests.orchestrator.records import request_record


class Kept:
    """A history, and what is open or has just ended."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.under_way: list[RequestRecord] = []
        self.pending: list[RequestRecord] = []
        self.history = History(["m", "n"], lambda: self.under_way, self.pending, time=lambda: self.now)

    def ends(self, name: str, took: float = 1.0, at: float = 1000.0, **fields: Any) -> RequestRecord:
        fields = {"admitted": at - took, "status": 200, "model_index": 0} | fields
        record = request_record(name, "/v1/completions", at - took, finished=at, **fields)
        self.history.note([record])
        return record

    def names(self, **query: Any) -> list[str]:
        return [record.request_id for record in self.history.find(RequestQuery(**query))]


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_the_last_ones_are_found_the_newest_first(kept: Kept) -> None:
    for index in range(KEPT + 100):
        kept.ends(f"r{index}", at=1000.0 + index)
    kept.pending.append(request_record("pending", received=5000.0, finished=5001.0))
    kept.under_way.append(request_record("open", received=5002.0))
    assert kept.names(limit=3) == ["open", "pending", f"r{KEPT + 99}"]
    assert kept.names(name="r100") == ["r100"]
    assert len(kept.names(limit=5000)) == KEPT + 2 + KEPT_LONG - (KEPT_LONG - 100)


def test_a_request_that_is_kept_twice_is_one(kept: Kept) -> None:
    kept.ends("r", took=50.0, error_code="worker_lost", status=502)
    assert kept.names() == ["r"]


def test_the_slowest_are_kept_for_longer(kept: Kept) -> None:
    kept.ends("slow", took=60.0)
    for index in range(5 * KEPT):
        kept.ends(f"r{index}", took=2.0 + index % 7)
    kept.ends("slower", took=90.0)
    assert kept.names(slowest=True, limit=2) == ["slower", "slow"]
    assert sorted(kept.names(slower_s=59.0)) == ["slow", "slower"]
    assert len(kept.names(limit=10_000)) <= KEPT + KEPT_LONG


def test_those_that_were_slow_long_ago_make_room(kept: Kept) -> None:
    kept.ends("old", took=500.0)
    for index in range(2 * KEPT):
        kept.ends(f"r{index}", took=1.0, at=1000.0 + LONG_S + 10.0 + index / 100)
    assert "old" not in kept.names(limit=10_000)
    assert len(kept.history._slow) == KEPT_LONG


def test_the_failed_are_kept_for_longer(kept: Kept) -> None:
    lost = kept.ends("lost", status=502, error_code="worker_lost")
    kept.ends("cut", error_code="worker_cut_short")
    kept.ends("again", attempts=Attempts([FailedAttempt("m/decode/0", "silent", 3.0)], 2))
    kept.ends("mistaken", status=400, error_code="invalid_request")
    kept.ends("left", status=499, error_code=CLIENT_GONE)
    assert kept.names(failed=True) == ["lost", "cut", "again", "mistaken", "left"]
    for index in range(2 * KEPT):
        kept.ends(f"r{index}", took=5.0, at=2000.0)
    assert kept.names(failed=True) == ["lost", "cut", "again"]
    assert kept.history.find(RequestQuery(name="lost")) == [lost]


def test_a_flood_of_refused_requests_drops_no_other(kept: Kept) -> None:
    kept.ends("served")
    for index in range(3 * KEPT):
        kept.ends(f"x{index}", admitted=0.0, status=(401, 429)[index % 2], error_code="x", at=2000.0 + index)
        kept.ends(f"y{index}", admitted=0.0, status=503, error_code="too_many_connections", at=1999.0)
    kept.ends("no id", admitted=0.0, status=503, error_code="overloaded")
    assert kept.names(name="served") == ["served"]
    assert kept.names(name="no id") == ["no id"]
    assert kept.names(limit=1) == [f"x{3 * KEPT - 1}"]
    assert len(kept.names(limit=10_000)) == KEPT + 2


def test_the_usage_of_an_answer_is_not_kept(kept: Kept) -> None:
    assert kept.ends("a", usage={"prompt_tokens": Raw(b"1")}).usage == 0


def test_what_has_no_id_is_not_kept(kept: Kept) -> None:
    kept.ends("", admitted=0.0, status=404, error_code="not_found")
    assert kept.names() == []


def test_nor_is_it_shown_before_it_would_be_kept(kept: Kept) -> None:
    kept.pending.append(request_record("", finished=1.0, status=400, error_code="invalid_request"))
    assert kept.names() == []


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"key": "alice"}, ["a"]),
        ({"model": "n"}, ["b"]),
        ({"model": "x"}, []),
        ({"worker": "m/prefill/1"}, ["c", "a"]),
        ({"worker": "m/prefill/1", "key": "alice"}, ["a"]),
        ({"slower_s": 1.5}, ["open", "b"]),
        ({"limit": 0}, []),
    ],
)
def test_requests_are_picked(kept: Kept, query: dict[str, Any], names: Sequence[str]) -> None:
    kept.ends("a", client="alice", prefill_worker="m/prefill/1", at=1001.0)
    kept.ends("b", took=2.0, model_index=1, at=1003.0)
    kept.ends("c", attempts=Attempts([FailedAttempt("m/prefill/1", "silent", 1.0)], 2), at=1004.0)
    kept.under_way.append(request_record("open", received=1004.0))
    kept.now = 1010.0
    assert kept.names(**query) == names


def test_every_name_by_which_a_client_knows_a_request_finds_it(kept: Kept) -> None:
    trail = Trail()
    trail.legs_id, trail.answer_id = "req-5", "req-5-2"
    kept.ends("req-4", trail=trail)
    found = ("req-4", "req-5", "req-5-2", "chatcmpl-req-5-2", "cmpl-req-5-2", "msg_req-5-2", "resp_req-5-2")
    for name in found:
        assert kept.names(name=name) == ["req-4"], name
    for name in ("", "-", "_", "req-6", "5-2", "\r\n", "é" * 1000):
        assert kept.names(name=name) == [], name


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (b"x-request-id: a/strange one\r\n", "a/strange one"),
        (b'"in-the-body"', "in-the-body"),
        (b"x-request-id: \xff\xfe\r\n", "\xff\xfe"),
        (b'"', "\x00"),
    ],
)
def test_what_a_client_calls_it_by_itself_finds_it_too(kept: Kept, block: bytes, name: str) -> None:
    trail = Trail()
    trail.client_id = block
    kept.ends("req-4", trail=trail)
    assert kept.names(name=f"chatcmpl-{name}") == (["req-4"] if name != "\x00" else [])


def test_the_memory_of_a_history_is_bounded() -> None:
    kept = Kept()

    def serve(count: int) -> None:
        for index in range(count):
            trail = Trail()
            trail.answer_id = f"req-{index}-2"
            failed = Attempts([FailedAttempt("m/decode/0", "silent", 1.0)], 2) if index % 2 else None
            kept.ends(f"req-{index}", took=index % 100, attempts=failed, trail=trail)

    serve(3 * KEPT)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        serve(10 * KEPT)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 4_000_000  # what was there before was not traced, and has been replaced
