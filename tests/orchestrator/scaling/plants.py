"""A plant is a load that is always the same, as reports tell of it, on as many workers as are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.config.options import Config
from orchestrator.scaling.planner import ScalingPlanner
from orchestrator.scaling.reports import Report, Stage, WorkerReport
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry.counters import GAP_BOUNDS, STAGE_BOUNDS

MODEL = "m"
LOOK_S = 2.5


def config_of(
    prefill: str = "{min: 1, max: 40}", decode: str = "{min: 1, max: 40}", seats: int = 64, **scaling: float
) -> Config:
    from orchestrator.config.yaml12 import parse

    pools = {"prefill": prefill, "decode": decode}
    model = {role: {"engine": "sim", "replicas": parse(text, "").data()} for role, text in pools.items()}
    model["decode"]["seats"] = seats
    return Config.model_validate({"models": [{"name": MODEL, **model}], "scaling": scaling})


def planner_of(config: Config) -> ScalingPlanner:
    assert config.scaling is not None
    return ScalingPlanner(config, config.scaling)


@dataclass
class Load:
    """Prompts come at a rate and keep a worker busy for so long; answers take so long, and a token does."""

    rate: float = 4.0
    busy_s: float = 0.5
    answer_s: float = 5.0
    gap_s: float = 0.02
    first_s: float = 0.3


class Plant:
    """It runs what the planner wants at once, or never if it `is_stuck`."""

    def __init__(self, planner: ScalingPlanner, load: Load) -> None:
        self.planner = planner
        self.load = load
        self.moment = 0.0
        self.is_stuck = False
        self.draining = 0  # decode workers
        self.ready = {"prefill": 1, "decode": 1}
        self.starting = {"prefill": 0, "decode": 0}
        self.wanted: list[tuple[int, int]] = []  # after each decision
        self._entered = self._due = self._work_s = 0.0
        self._first = [0] * (len(STAGE_BOUNDS) + 1)
        self._gaps = [0] * (len(GAP_BOUNDS) + 1)
        self._gaps_s = 0.0

    def run(self, seconds: float) -> tuple[int, int]:
        """Let time pass; return how many prefill and decode workers are wanted then."""
        until = self.moment + seconds
        while self.moment < until:
            self.moment += LOOK_S
            if self.planner.note(MODEL, self.report()):
                self._follow()
        return self.wanted[-1]

    def wishes(self) -> dict[str, Wish]:
        return {wish.role: wish for wish in self.planner.wishes()}

    def report(self, **changes: object) -> Report:
        self._count()
        made = Report(
            moment=self.moment,
            workers=list(self._workers()),
            queued=0,
            entered=int(self._entered),
            answered=int(self._entered),
            new_tokens=int(self._entered) * 1000,
            first_tokens=tuple(self._first),
            gaps=tuple(self._gaps),
            gaps_s=self._gaps_s,
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    def _count(self) -> None:
        before = int(self._entered)
        self._entered += self.load.rate * LOOK_S
        answers = int(self._entered) - before
        self._first[_place(STAGE_BOUNDS, self.load.first_s)] += answers
        self._gaps[_place(GAP_BOUNDS, self.load.gap_s)] += answers
        self._gaps_s += answers * self.load.gap_s

    def _workers(self) -> Iterator[WorkerReport]:
        """Yield the workers; how many have a prompt is whole, and right on average."""
        load, ready = self.load, self.ready["prefill"]
        self._work_s += load.rate * load.busy_s * LOOK_S
        before, self._due = int(self._due), self._due + min(self._work_s, ready * LOOK_S) / LOOK_S
        busy = int(self._due) - before
        self._work_s -= min(self._work_s, ready * LOOK_S)
        waiting = int(self._work_s / load.busy_s)
        for place in range(ready):
            legs = int(place < busy) + waiting // ready + (place < waiting % ready)
            yield WorkerReport("prefill", Stage.READY, legs, legs)
        prompts = busy + waiting
        answers = int(load.rate * load.answer_s) + prompts
        for place in range(self.ready["decode"]):
            legs = answers // self.ready["decode"] + (place < answers % self.ready["decode"])
            yield WorkerReport("decode", Stage.READY, legs, legs)
        for role, count in self.starting.items():
            for _ in range(count):
                yield WorkerReport(role, Stage.STARTING, 0, 0)  # type: ignore[arg-type]
        for _ in range(self.draining):
            yield WorkerReport("decode", Stage.DRAINING, 1, 1)

    def _follow(self) -> None:
        wanted = {role: wish.wanted for role, wish in self.wishes().items()}
        self.wanted.append((wanted["prefill"], wanted["decode"]))
        for role, count in wanted.items():
            if self.is_stuck:
                self.starting[role] = max(0, count - self.ready[role])
                self.ready[role] = min(self.ready[role], count)
            else:
                self.ready[role] = count


def _place(bounds: tuple[float, ...], value: float) -> int:
    return next((place for place, bound in enumerate(bounds) if value <= bound), len(bounds))
