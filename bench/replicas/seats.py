"""Clients stick to one of several orchestrators, or processes of one, in virtual time: how many requests wait
for a seat while there are free ones?

The gates are the real ones, and so is what the workers report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal

from bench.replicas.views import POLL_S
from launch.simulate.heap import VirtualClock
from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.options import Config, QueueConfig, RoutingConfig
from orchestrator.errors import BatonError
from orchestrator.processes.rows import Rows
from orchestrator.relay.admission import LOOK_S, SWEEP_S, Admission
from orchestrator.relay.waiting import Demand
from orchestrator.routing.policies import POLICIES as ROUTING
from orchestrator.routing.policies.base import Choice, Context
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.registry import Registry
from orchestrator.workers.scarcity import Scarcity
from orchestrator.workers.worker import Worker
from worker.load import Figures, LoadMeter, Sender

SHARES: Final = (0.55, 0.15, 0.15, 0.15)  # of the clients
HOLD_S: Final = 8.0  # how long a seat is taken, in the mean; exponential
DEADLINE_S: Final = 1e6  # nobody is sent away

_INFO: Final = WorkerInfo(role="decode", model="m", decodes=["json"], engine="sim", engine_version="0")

Division = Literal["shares", "reports"]
POLICIES: Final[dict[Division, str]] = {
    "shares": "each has a fixed share of the seats",
    "reports": "each takes what others leave, by reports",
}


@dataclass(frozen=True)
class Skewed:
    """So much is there."""

    division: Division
    is_one: bool  # an orchestrator with several processes, else several orchestrators
    load: float = 0.8  # of all seats
    workers: int = 4
    seats: int = 64  # of each worker
    requests: int = 20_000


class _Member:
    """An orchestrator, or a process of one, has a gate."""

    def __init__(self, number: int, site: Skewed, registry: Registry, clock: VirtualClock) -> None:
        self.sender = Sender(b"one" if site.is_one else b"o%d" % number, b"")
        self.registry = registry
        count = len(SHARES)
        is_fixed = site.division == "shares"
        self.admission = Admission(
            registry.pools,
            QueueConfig(timeout_s=DEADLINE_S, requests=1_000_000, tokens=10**9, bytes=10**9),
            seats={"m": {"decode": site.seats // count if is_fixed else site.seats}},
            processes=1 if is_fixed or not site.is_one else count,
            telemetry=Telemetry(Layout(["m"], [])),
            time=clock.time,
        )
        self.gate = self.admission.gates["m"]
        self.scarcity = Scarcity(_config(site.seats), registry.pools)
        if is_fixed:
            self.gate.look = None
        context = Context("m", "decode", Random(number), clock.time)
        self.policy = ROUTING["least_loaded"].make(context)


class _Wait:
    """A request waits for its seat."""

    def __init__(self, run: Run, member: _Member) -> None:
        self._run = run
        self._member = member
        self._is_over = False

    def done(self) -> bool:
        return self._is_over

    def cancelled(self) -> bool:
        return False

    def result(self) -> BatonError | None:
        return None

    def set_result(self, result: BatonError | None, /) -> None:
        self._is_over = True
        self._run.begin(self._member)


class Run:
    def __init__(self, site: Skewed, seed: int) -> None:
        self._site = site
        self._random = Random(f"{seed} {site.requests}")
        self._clock = VirtualClock()
        self.meters = [LoadMeter(_no_figures, clock=self._clock.time) for _ in range(site.workers)]
        self._members = list(_members(site, self._clock))
        self._left = site.requests
        self._legs = 0
        self.came = self.waited = 0  # of those that came while there were free seats
        self.begun = self.over = 0  # of all, and of those that had more seats taken than there are
        self.asked = 0  # for reports of all workers

    def run(self) -> None:
        jitter = Random(1)
        for member in self._members:
            self._later(jitter.random() * POLL_S, self._poll, (member, jitter))
            self._later(SWEEP_S, self._sweep, member)
        self._later(0.0, self._arrive, None)
        self._clock.run()

    @property
    def _has_free(self) -> bool:
        return self._legs < self._site.seats * self._site.workers

    def _later(self, seconds: float, call: Any, argument: Any) -> None:
        self._clock.at(self._clock.now + seconds, call, argument)

    def _poll(self, of: tuple[_Member, Random]) -> None:
        member, jitter = of
        if self._site.division == "reports":
            for worker, meter in zip(member.registry.workers, self.meters, strict=True):
                meter.note_asked(member.sender)
                member.registry.reports.note(worker, meter.report(member.sender))
            self.asked += 1
        if self._left:
            pause_s = member.scarcity.pause_s(member.registry.workers[0], POLL_S)
            self._later(pause_s * jitter.uniform(0.8, 1.2), self._poll, of)

    def _sweep(self, member: _Member) -> None:
        member.admission.sweep()
        if self._left or self._legs or member.gate.waiting:
            self._later(LOOK_S if member.admission.awaits_others else SWEEP_S, self._sweep, member)

    def _arrive(self, _: None) -> None:
        self._left -= 1
        member = self._random.choices(self._members, SHARES)[0]
        if self._left:
            rate = self._site.load * self._site.seats * self._site.workers / HOLD_S
            self._later(self._random.expovariate(rate), self._arrive, None)
        gate, is_free = member.gate, self._has_free
        self.came += is_free
        if gate.take():
            self.begin(member)
        else:
            self.waited += is_free
            gate.enqueue(Demand(1, 1, self._clock.now + DEADLINE_S, is_stream=True), _Wait(self, member))

    def begin(self, member: _Member) -> None:
        """Have a request that has its permit served."""
        choice: Choice[Worker] = member.policy.choose(None, member.registry.pools["m"].decode)  # type: ignore[arg-type]
        worker = choice.worker
        worker.count_leg(1)
        self.meters[worker.slot].begin(member.sender)
        self._legs += 1
        self.begun += 1
        self.over += self._legs > self._site.seats * self._site.workers
        record = RequestRecord("", "", self._clock.now)
        record.admitted = self._clock.now
        self._later(self._random.expovariate(1 / HOLD_S), self._end, (member, worker, record))

    def _end(self, of: tuple[_Member, Worker, RequestRecord]) -> None:
        member, worker, record = of
        worker.count_leg(-1)
        self.meters[worker.slot].end(member.sender)
        self._legs -= 1
        member.gate.give_back(record)


def beside_free_seats(site: Skewed, seed: int) -> float:
    """Return the share of requests that have to wait, of those that come while there are free seats."""
    made = done(site, seed)
    return made.waited / made.came


def done(site: Skewed, seed: int) -> Run:
    made = Run(site, seed)
    made.run()
    return made


def _members(site: Skewed, clock: VirtualClock) -> Iterator[_Member]:
    addresses = [_address(index) for index in range(site.workers)]
    rows = Rows.create(Layout(["m"], []), site.workers, 1 + len(SHARES))
    rows.close()
    for number in range(len(SHARES)):
        loads = rows.loads(1 + number) if site.is_one and site.division == "reports" else None
        registry = Registry(addresses, ["m"], "json", loads, routing=RoutingConfig(), time=clock.time)
        for worker in registry.workers:
            registry.announce(worker, Introduction(_INFO, None))
            registry.judge.mark_ready(worker)
        yield _Member(number, site, registry, clock)


def _no_figures(rank: int | None) -> Figures:
    return Figures(0, 0, 0, 0.0, None)


def _config(seats: int) -> Config:
    pool = {"urls": ["http://h:1"]}
    return Config.model_validate(
        {"models": [{"name": "m", "prefill": pool, "decode": {"urls": ["http://h:2"], "seats": seats}}]}
    )


def _address(index: int) -> WorkerAddress:
    return WorkerAddress(
        name=f"m/decode/{index}",
        model="m",
        served_model="m",
        role="decode",
        url=f"http://h:{1 + index}",
        host="h",
        port=1 + index,
        side_channel_port=None,
        is_managed=False,
    )
