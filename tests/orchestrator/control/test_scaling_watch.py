"""A watch reports what there is of each model, in numbers that only grow, and tells what is wanted once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.config.options import Config
from orchestrator.control import scaling_watch
from orchestrator.control.admin import admin_app
from orchestrator.control.scaling_watch import ScalingWatch
from orchestrator.control.worker_watch import WorkerWatch
from orchestrator.scaling.planner import ScalingPlanner
from orchestrator.scaling.reports import Report, Stage
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry import counters
from orchestrator.telemetry.counters import GAP_BOUNDS, STAGE_BOUNDS, Layout
from orchestrator.telemetry.events import Events
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.control.fakes import FakeState, ask

POOL = {"engine": "sim", "replicas": {"min": 1, "max": 9}}
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


def config_of(scaling: dict[str, Any] | None, *others: str) -> Config:
    more = [{"name": name, "both": {"engine": "sim", "replicas": 1}} for name in others]
    pool = POOL if scaling is not None else {"engine": "sim", "replicas": 1}
    models = [{"name": "m", "prefill": pool, "decode": {**pool, "seats": 10}}, *more]
    return Config.model_validate({"models": models, "scaling": scaling})


class Watched:
    """Two workers of each role, what was counted, and the watch; what it reports is kept."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *others: str,
        scaling: dict[str, Any] | None = None,
        **pools: int,
    ) -> None:
        self.config = config_of({} if scaling is None else scaling, *others)
        self.layout = Layout([model.name for model in self.config.models], ENDPOINTS)
        self.row = [0] * self.layout.size
        self.clock = Clock()
        self.events = Events()
        self.registry = registry_of(pools or {"prefill": 2, "decode": 2}, clock=self.clock)  # type: ignore[arg-type]
        self.reports: dict[str, Report] = {}
        note = ScalingPlanner.note

        def kept(planner: ScalingPlanner, model: str, report: Report) -> bool:
            self.reports[model] = report
            return note(planner, model, report)

        monkeypatch.setattr(ScalingPlanner, "note", kept)
        self.watch = self.watch_of(self.config)

    def watch_of(self, config: Config) -> ScalingWatch:
        return ScalingWatch(config, self.registry, self.layout, self._counts, self.events, clock=self.clock)

    def _counts(self) -> Sequence[int]:
        return self.row

    def look(self, seconds: float = 0.5) -> None:
        """Let time pass, with a look at its end."""
        self.clock.now += seconds
        self.watch.look()

    def pass_(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.look()

    def finish(self, status: str, times: int, model: int = 0, endpoint: int = 0) -> None:
        place = self.layout.statuses.index(status)
        self.row[self.layout.request_cell(model, endpoint) + place] += times

    def wishes(self) -> dict[str, Wish]:
        return {wish.role: wish for wish in self.watch.wishes()}


def test_legs_of_others_are_told_from_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    first, *_, last = watched.registry.workers
    for _ in range(3):
        first.count_leg(1)
    first.note_others(4)
    last.note_others(5)
    watched.look()
    told = [(w.role, w.stage, w.legs, w.own_legs) for w in watched.reports["m"].workers]
    assert told == [
        ("prefill", Stage.READY, 7, 3),
        ("prefill", Stage.READY, 0, 0),
        ("decode", Stage.READY, 0, 0),
        ("decode", Stage.READY, 5, 0),
    ]


def test_legs_of_others_take_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    for worker in watched.registry.workers[2:]:
        worker.note_others(12)
    watched.pass_(60)
    assert watched.wishes()["decode"].wanted == 3  # 24 seats, 8 of 10 each
    assert watched.wishes()["decode"].ready == 2


def test_what_is_let_in_is_what_was_answered_and_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    for status in counters.STATUSES:
        watched.finish(str(status), 1)
    watched.finish("200", 10, endpoint=1)
    watched.row[watched.layout.in_flight] = 7
    watched.row[watched.layout.queue_cell(0)] = 2
    watched.look()
    report = watched.reports["m"]
    let_in = len([status for status in counters.STATUSES if str(status) in scaling_watch.LET_IN])
    assert let_in == len(scaling_watch.LET_IN)
    assert (report.queued, report.entered, report.answered) == (2, let_in + 10 + 7 - 2, 11)


def test_answers_are_told_as_they_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    answers = watched.layout.answer_cell(0)
    watched.row[answers + counters.PROMPT_TOKENS] = 900
    watched.row[answers + counters.CACHED_TOKENS] = 300
    first, gaps = answers + counters.FIRST_TOKEN, answers + counters.INTER_TOKEN
    watched.row[first] = 1
    watched.row[first + len(STAGE_BOUNDS)] = 2  # above the last bound
    watched.row[first + len(STAGE_BOUNDS) + 1] = 77  # the sum
    watched.row[gaps + len(GAP_BOUNDS)] = 3
    watched.row[gaps + len(GAP_BOUNDS) + 1] = 2_500_000
    watched.look()
    report = watched.reports["m"]
    assert report.new_tokens == 600
    assert (len(report.first_tokens), len(report.gaps)) == (len(STAGE_BOUNDS) + 1, len(GAP_BOUNDS) + 1)
    assert (report.first_tokens[0], report.first_tokens[-1], report.gaps[-1]) == (1, 2, 3)
    assert report.gaps_s == 2.5


def test_more_cached_than_there_was_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.row[watched.layout.answer_cell(0) + counters.CACHED_TOKENS] = 300
    watched.row[watched.layout.queue_cell(0)] = 3  # of requests that are not counted as under way yet
    watched.look()
    assert (watched.reports["m"].new_tokens, watched.reports["m"].entered) == (0, 0)
    assert watched.reports["m"].is_sound()


def test_models_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "other")
    watched.finish("200", 4, model=0)
    watched.finish("200", 5, model=1)
    watched.row[watched.layout.in_flight + 1] = 6
    watched.row[watched.layout.queue_cell(1)] = 1
    watched.row[watched.layout.answer_cell(1) + counters.PROMPT_TOKENS] = 8
    watched.look()
    own, other = watched.reports["m"], watched.reports["other"]
    assert (own.entered, own.queued, own.new_tokens, len(own.workers)) == (4, 0, 0, 4)
    assert (other.entered, other.queued, other.new_tokens, len(other.workers)) == (10, 1, 8, 0)
    watched.pass_(20)
    assert {(wish.model, wish.role) for wish in watched.watch.wishes()} == {
        ("m", "prefill"), ("m", "decode"), ("other", "both")
    }  # fmt: skip
    assert watched.wishes()["both"].why == "it stays so: no worker is ready"


def test_workers_without_legs_that_are_drained_are_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    busy, free, *_ = watched.registry.workers
    busy.count_leg(1)
    for worker in (busy, free):
        watched.registry.drain(worker)
    watched.look()
    stages = [worker.stage for worker in watched.reports["m"].workers]
    assert stages == [Stage.DRAINING, Stage.READY, Stage.READY]


def test_without_data_what_there_is_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert watched.watch.wishes() == []
    watched.pass_(9)
    assert [(wish.role, wish.wanted) for wish in watched.watch.wishes()] == [("prefill", 2), ("decode", 2)]
    assert watched.events.after() == []


def test_news_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "baton.scaling")
    watched = Watched(monkeypatch)
    watched.pass_(30)
    for worker in watched.registry.workers[2:]:
        worker.note_others(12)
    watched.pass_(100)
    [event] = watched.events.after()
    assert (event.kind, event.subject) == ("scaling.wanted", "m/decode")
    assert event.message.startswith("m/decode: 3 workers are wanted, 2 before: 24 seats taken")
    assert caplog.messages == [event.message]


def test_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.pass_(30)
    before = watched.wishes()
    watched.look(-500.0)
    watched.look(1e6)
    watched.look(0.0)
    assert {role: wish.wanted for role, wish in watched.wishes().items()} == {
        role: wish.wanted for role, wish in before.items()
    }


def test_a_section_that_was_reloaded_holds_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    for worker in watched.registry.workers[2:]:
        worker.note_others(12)
    watched.pass_(60)
    assert watched.wishes()["decode"].wanted == 3
    WorkerWatch(watched.config, watched.registry, lambda slot: (), watched.events, watched.watch).reconfigure(
        config_of({"decode_seats": 0.5})
    )
    watched.pass_(60)
    assert watched.wishes()["decode"].wanted == 5
    watched.watch.reconfigure(config_of({"max_gpus": 2}))
    assert {role: wish.wanted for role, wish in watched.wishes().items()} == {"prefill": 1, "decode": 1}
    watched.watch.reconfigure(config_of(None))  # to be without a section needs a restart
    assert watched.wishes()["decode"].wanted == 1


def test_without_a_section_nothing_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watch = watched.watch_of(config_of(None))
    watch.look()
    watch.reconfigure(config_of({}))
    watch.look()
    assert (watched.reports, list(watch.wishes())) == ({}, [])

    async def runs_on() -> bool:
        task = asyncio.create_task(watch.run())
        await asyncio.sleep(0)
        is_done = task.done()
        task.cancel()
        return is_done

    assert not asyncio.run(runs_on())


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    state = FakeState(registry=watched.registry, events=watched.events)
    app = admin_app(state)
    assert "no section `scaling`" in ask(app, "/admin/scaling").json()["error"]["message"]
    state.config = watched.config
    state.watch = WorkerWatch(state.config, watched.registry, lambda slot: (), watched.events, watched.watch)
    assert ask(app, "/admin/scaling").json() == []
    watched.look()
    prefill, decode = ask(app, "/admin/scaling").json()
    assert prefill == {
        "model": "m", "role": "prefill", "wanted": 2, "ready": 2, "starting": 0, "draining": 0,
        "why": "nothing is known yet",
    }  # fmt: skip
    assert decode["role"] == "decode"
