"""With real processes: mock workers, routers that work, fail or are missing, and small loads."""

from __future__ import annotations

import os
import re
from collections.abc import Set
from dataclasses import dataclass

import pytest

from bench.compare import wrk
from bench.compare.cluster import Target
from bench.compare.comparison import Row, compare
from bench.compare.measures import ClosedLoop, HeldStreams, Measure, OpenLoop
from bench.compare.routers import ROUTERS, Router
from bench.compare.workloads import Workload
from bench.shared.bodies import small_chat
from bench.shared.cores import Cores
from bench.shared.figures import Column, Sample
from bench.shared.processes import Failed, python

pytestmark = pytest.mark.processes


@dataclass
class OnePost:
    """The least load: fails in one of its rounds, if it is told to."""

    body: bytes = small_chat()
    fails_in_round: int | None = None
    rounds: int = 0
    cores: Set[int] = frozenset()  # of the last router

    columns = (Column("rounds", "rounds", 0),)

    def lacks(self) -> str | None:
        return None

    def prepare(self, target: Target) -> None:
        assert target.port

    def sample(self, target: Target, seconds: int) -> Sample:
        self.rounds += 1
        self.cores = os.sched_getaffinity(target.pid)
        if self.rounds == self.fails_in_round:
            raise Failed("HTTP 500: out of luck")
        return {"rounds": self.rounds}


# A worker that is asked without a router between answers too.
MOCK = Router("mock", lambda site: python("-m", "bench.shared.mock_worker", "--port", str(site.port)))
BROKEN = Router("broken", lambda site: python("-c", "raise SystemExit('no configuration')"))
MISSING = Router("missing", lambda site: ["/nowhere/router"])
NOT_INSTALLED = Router("peer", lambda site: [], lacks=lambda: "peer is not installed")
AIOHTTP = next(router for router in ROUTERS if router.name == "aiohttp-proxy")


def rows_of(measure: Measure, *routers: Router, rounds: int = 1, is_fresh: bool = False) -> list[Row]:
    core = {min(os.sched_getaffinity(0))}
    workload = Workload("test", "a test", measure, worker=("--events", "2"), is_fresh=is_fresh)
    said: list[str] = []
    rows = compare(
        workload, list(routers), cores=Cores(core, core), rounds=rounds, seconds=1, say=said.append
    )
    assert said == [f"test: round {number} of {rounds}" for number in range(1, rounds + 1)]
    return rows


@pytest.mark.parametrize("is_wide", [False, True])
def test_routers_have_one_core_or_all_where_several_processes_are_compared(is_wide: bool) -> None:
    mine = sorted(os.sched_getaffinity(0))
    cores = Cores({mine[0]}, {mine[-1]})
    measure = OnePost()
    workload = Workload("test", "a test", measure, is_wide=is_wide)
    (row,) = compare(workload, [MOCK], cores=cores, rounds=1, seconds=1, say=lambda text: None)
    assert row.reason is None
    assert measure.cores == ({mine[0], mine[-1]} if is_wide else {mine[0]})


def test_rounds_are_interleaved() -> None:
    rows = rows_of(OnePost(), MOCK, AIOHTTP, rounds=2)
    assert [[sample["rounds"] for sample in row.samples] for row in rows] == [[1, 3], [2, 4]]


def test_routers_that_do_not_run_have_their_reason_and_stop_nobody() -> None:
    rows = rows_of(OnePost(), BROKEN, MISSING, NOT_INSTALLED, MOCK)
    reasons = [row.reason for row in rows]
    assert reasons[0] == "ended with 1: no configuration"
    assert "/nowhere/router" in str(reasons[1])
    assert reasons[2:] == ["peer is not installed", None]
    assert [len(row.samples) for row in rows] == [0, 0, 0, 1]


@pytest.mark.parametrize("is_fresh", [False, True])
def test_router_that_fails_once_is_not_tried_again(is_fresh: bool) -> None:
    measure = OnePost(fails_in_round=2)
    (row,) = rows_of(measure, MOCK, rounds=4, is_fresh=is_fresh)
    assert row.reason == "HTTP 500: out of luck"
    assert measure.rounds == 2


def test_missing_load_leaves_every_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.wrk.shutil.which", lambda name: None)
    rows = rows_of(ClosedLoop(small_chat()), MOCK, AIOHTTP)
    assert {row.reason for row in rows} == {"wrk is not installed (Debian: apt-get install wrk)"}


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(
            ClosedLoop(small_chat(stream=True), connections=4, unit="event"),
            marks=pytest.mark.skipif(wrk.lacks() is not None, reason="needs wrk"),
        ),
        pytest.param(
            ClosedLoop(small_chat(), connections=4, keep_alive=False),
            marks=pytest.mark.skipif(wrk.lacks() is not None, reason="needs wrk"),
        ),
        OpenLoop(rate=50, stretch=1),
        HeldStreams(small_chat(stream=True), streams=40),
    ],
)
def test_every_kind_of_load_fills_its_columns(measure: Measure) -> None:
    (row,) = rows_of(measure, AIOHTTP, is_fresh=True)
    assert row.reason is None
    assert set(row.samples[0]) == {column.key for column in measure.columns}


def test_refused_path_is_a_reason() -> None:
    refusing = Router(
        "refusing", lambda site: python("-m", "http.server", "--bind", "127.0.0.1", str(site.port))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.compare.cluster.READY_LIMIT_S", 0.0)
        (row,) = rows_of(OnePost(), refusing)
    assert re.match(r"not ready after 0 s: HTTP 501", str(row.reason))
