from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.options import Config
from orchestrator.processes.rows import BASE, DISCOVERED_WORKERS, SPARE_WORKERS, Rows, spare_workers
from orchestrator.telemetry.counters import Layout, Telemetry, sum_rows
from orchestrator.telemetry.record import RequestRecord
from orchestrator.telemetry.tenants import CHARGED_TOKENS, OPEN, REQUESTS, SLOTS, KeyTable
from orchestrator.transport.base import UpstreamStats
from orchestrator.workers.figures import CacheFigures
from orchestrator.workers.registry import Registry
from tests.orchestrator.cluster import address
from tests.orchestrator.records import request_record

LAYOUT = Layout(["m"], ["/v1/completions"])
WORKERS = 3


@pytest.fixture
def rows() -> Iterator[Rows]:
    made = Rows.create(LAYOUT, WORKERS, 4)
    yield made
    made.close()


def record() -> RequestRecord:
    return request_record(received=1.0, finished=2.0, status=200)


def serve(telemetry: Telemetry, ended: int, open_: int = 0) -> None:
    for _ in range(ended):
        done = record()
        telemetry.begin(done)
        telemetry.finish(done)
    for _ in range(open_):
        telemetry.begin(record())
    telemetry.fold()  # as it does now and then, and before its end


def test_rows_add_up(rows: Rows) -> None:
    alone = Telemetry(LAYOUT)
    serve(alone, 5, open_=2)
    serve(Telemetry(LAYOUT, rows.telemetry(1)), 2, open_=2)
    serve(Telemetry(LAYOUT, rows.telemetry(3)), 3)
    assert rows.counts() == list(alone.row)
    assert [rows.in_flight(row) for row in range(4)] == [0, 2, 0, 0]


def test_each_event_loop_beats_for_itself(rows: Rows) -> None:
    rows.beat(1)
    rows.beat(1)
    assert [rows.beats(row) for row in range(3)] == [0, 2, 0]
    assert rows.upstream() == UpstreamStats(0, 0, 0, 0, 0)
    rows.fold(1)
    assert rows.beats(1) == 0


def test_folding_keeps_counters_and_drops_what_was_in_flight(rows: Rows) -> None:
    serve(Telemetry(LAYOUT, rows.telemetry(1)), 2, open_=2)
    rows.note_upstream(1, UpstreamStats(idle=1, busy=2, connects=3, reuses=4, retries=5))
    rows.loads(1)[0].own_legs[0] += 1
    before = rows.counts()
    rows.fold(1)
    after = rows.counts()
    assert [after[cell] for cell in LAYOUT.counters] == [before[cell] for cell in LAYOUT.counters]
    assert sum(after[: LAYOUT.requests]) == 0
    assert rows.upstream() == UpstreamStats(idle=0, busy=0, connects=3, reuses=4, retries=5)
    assert [sum(load.legs) for load in rows.loads(BASE)] == [0] * WORKERS


def test_a_row_is_used_again_after_folding(rows: Rows) -> None:
    for generation in range(1, 4):
        serve(Telemetry(LAYOUT, rows.telemetry(2)), 1)
        assert sum(rows.counts()[cell] for cell in range(LAYOUT.requests, LAYOUT.stages)) == generation
        rows.fold(2)


@given(st.lists(st.tuples(st.sampled_from(["serve", "fold"]), st.integers(1, 3)), max_size=20))
def test_counters_never_fall(steps: list[tuple[str, int]]) -> None:
    rows = Rows.create(LAYOUT, WORKERS, 4)
    seen = rows.counts()
    for step, row in steps:
        if step == "serve":
            serve(Telemetry(LAYOUT, rows.telemetry(row)), 1, open_=1)
        else:
            rows.fold(row)
        now = rows.counts()
        assert all(now[cell] >= seen[cell] for cell in LAYOUT.counters)
        seen = now
    rows.close()


def test_each_process_sees_the_legs_of_all_and_changes_its_own(rows: Rows) -> None:
    one, two = rows.loads(1), rows.loads(2)
    one[1].own_legs[0] += 2
    two[1].own_legs[0] += 3
    two[2].own_legs[0] += 1
    assert [[sum(load.legs) for load in loads] for loads in (one, two)] == [[0, 5, 1]] * 2
    assert rows.counts() == sum_rows([LAYOUT.size * [0]])  # legs are not telemetry


def test_keys_are_counted_in_each_row_and_their_sums_outlive_their_process() -> None:
    rows = Rows.create(LAYOUT, WORKERS, 3, keys=SLOTS)
    tables = [KeyTable(rows.keys(), row, ["a", "b"]) for row in range(3)]
    for table in tables[1:]:
        cells = table.cells_of("b")
        assert cells is not None
        cells.add(OPEN, 1)
        cells.add(REQUESTS, 2)
        cells.add(CHARGED_TOKENS, -5)
    found = dict(tables[0].counted())["b"]
    assert [found[cell] for cell in (OPEN, REQUESTS, CHARGED_TOKENS)] == [2, 4, -10]
    rows.fold(1)
    found = dict(tables[2].counted())["b"]
    assert [found[cell] for cell in (OPEN, REQUESTS, CHARGED_TOKENS)] == [1, 4, -10]
    assert not any(rows.counts())
    rows.close()


def test_what_is_known_of_caches_adds_up_and_counters_outlive_their_process(rows: Rows) -> None:
    registries = [
        Registry([address("prefill", index) for index in range(2)], ["m"], "json", rows.loads(row))
        for row in range(3)
    ]
    base, one, two = [registry.workers[1] for registry in registries]
    one.note_cache_figures(CacheFigures(prompt_tokens=100, wrong_tokens=30, following=1, batches=5))
    two.note_cache_figures(
        CacheFigures(prompt_tokens=100, expected_tokens=50, missed_tokens=25, approximate=1, batches=7)
    )
    cache = base.status().cache
    assert cache is not None
    assert (cache.prediction_error, cache.missed_ratio, cache.is_trusted) == (0.15, 0.5, True)
    assert cache.kv_events is not None
    assert (cache.kv_events.state, cache.kv_events.batches) == ("approximate", 12)
    assert registries[0].workers[0].status().cache is None
    rows.fold(2)
    assert base.cache_figures() == CacheFigures(prompt_tokens=100, wrong_tokens=30, following=1, batches=12)


def test_rows_do_not_share_a_cache_line(rows: Rows) -> None:
    assert rows.row_size * 8 % 64 == 0


@pytest.mark.processes
def test_another_process_writes_to_the_same_memory(rows: Rows) -> None:
    script = (
        "import sys; from tests.orchestrator.processes.test_rows import *\n"
        "rows = Rows(int(sys.argv[1]), LAYOUT, WORKERS, 4)\n"
        "serve(Telemetry(LAYOUT, rows.telemetry(1)), 7); rows.loads(1)[2].own_legs[0] += 1"
    )
    subprocess.run([sys.executable, "-c", script, str(rows.fd)], pass_fds=[rows.fd], check=True)
    assert sum(rows.counts()[LAYOUT.requests : LAYOUT.stages]) == 7
    assert sum(rows.loads(BASE)[2].legs) == 1


def test_the_memory_has_no_name_and_other_programs_do_not_inherit_it(rows: Rows) -> None:
    assert os.fstat(rows.fd).st_nlink == 0
    assert not os.get_inheritable(rows.fd)


def test_there_is_room_for_hundreds_where_a_source_finds_workers() -> None:
    urls = {"urls": ["http://h:1"]}
    for prefill, room in ((urls, SPARE_WORKERS), ({"discover": {"dns": "h:1"}}, DISCOVERED_WORKERS)):
        model = {"name": "m", "prefill": prefill, "decode": urls}
        assert spare_workers(Config.model_validate({"models": [model]})) == room
