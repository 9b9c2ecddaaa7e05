"""Several orchestrators send to the same workers, in virtual time: how long do requests wait by what each of
them knows of the load?

The policy, the workers' counts and the meter in the worker are the real ones; a worker serves one request
after the other, as prefill workers do, and requests come at random to any of the orchestrators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal

from launch.simulate.heap import VirtualClock
from orchestrator.config.addresses import WorkerAddress
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome, Policy
from orchestrator.workers.worker import OwnWorker
from worker.load import Figures, LoadMeter, Sender

View = Literal["own", "polled alone", "polled", "reported"]
VIEWS: Final[dict[View, str]] = {
    "own": "own legs only (`load: own`)",
    "polled alone": "polled totals, without own legs since",
    "polled": "polled, and own legs",
    "reported": "polled and on answers, and own legs (`load: reported`)",
}

SERVICE_S: Final = 0.3  # the mean of a prefill; lognormal, with a spread of so many times that
SPREAD: Final = 1.5
TOKENS_PER_S: Final = 10_000
POLL_S: Final = 0.75  # `health.interval_s`, give or take a fifth
WARM_UP: Final = 0.1  # of the requests, which are not counted


@dataclass(frozen=True)
class Site:
    """So much is there."""

    orchestrators: int
    load: float  # of what the workers can do
    workers: int = 16
    requests: int = 20_000
    policy: str = "least_loaded"


class _Server:
    """A worker takes one request after the other, and counts whose they are."""

    def __init__(self, clock: VirtualClock) -> None:
        self.free_at = 0.0
        self.legs = 0
        self.meter = LoadMeter(self._figures, clock=clock.time)

    def _figures(self, rank: int | None) -> Figures:
        running = min(self.legs, 1)
        return Figures(running, self.legs - running, 0, 0.0, 1)


class _Polled:
    """This candidate is taken to have what its worker had when it was last asked."""

    epoch = 1
    kv_tokens = None

    def __init__(self, slot: int) -> None:
        self.name = f"m/prefill/{slot}"
        self.slot = slot
        self.in_flight = 0

    def note_others(self, legs: int) -> None:
        self.in_flight = legs

    def count_leg(self, change: int) -> None:
        """Own legs do not count."""


class _Orchestrator:
    """It sees the servers as its view lets it."""

    def __init__(self, name: str, view: View, servers: Sequence[_Server], policy: Policy) -> None:
        self.sender = Sender(name.encode(), b"")
        self.policy = policy
        self._view = view
        self.workers = [_seen(index, view) for index in range(len(servers))]

    def poll(self, index: int, meter: LoadMeter) -> None:
        report = meter.report(self.sender)
        told = report.busy if self._view == "polled alone" else report.others
        self.workers[index].note_others(told or 0)

    def note_answer(self, index: int, meter: LoadMeter) -> None:
        self.workers[index].count_leg(-1)
        worker = self.workers[index]
        if self._view == "reported" and isinstance(worker, OwnWorker):
            worker.note_load(meter.header(self.sender))


def _seen(index: int, view: View) -> OwnWorker | _Polled:
    if view == "polled alone":
        return _Polled(index)
    worker = OwnWorker(_address(index), "json", None, index)
    worker.reported.is_heard = view != "own"
    return worker


class _Prompt:
    """A policy may ask how long it is."""

    def __init__(self, service_s: float) -> None:
        self._tokens = int(service_s * TOKENS_PER_S)

    def prompt_tokens(self) -> int:
        return self._tokens


class Run:
    """One view of one site, with one seed. `wait_s` is the mean wait."""

    def __init__(self, site: Site, view: View, seed: int) -> None:
        self._site = site
        self._random = Random(f"{seed} {site}")  # the same for all views
        self._clock = VirtualClock()
        self._servers = [_Server(self._clock) for _ in range(site.workers)]
        self._orchestrators = [
            _Orchestrator(f"o{number}", view, self._servers, _policy(site.policy, seed + number, self._clock))
            for number in range(site.orchestrators)
        ]
        self._polls = view != "own"
        self._left = site.requests
        self._waits: list[float] = []

    def run(self) -> float:
        """Return the mean wait, in seconds."""
        jitter = Random(1)
        for orchestrator in self._orchestrators if self._polls else ():
            for index in range(len(self._servers)):
                self._later(jitter.random() * POLL_S, self._poll, (orchestrator, index, jitter))
        self._later(0.0, self._arrive, None)
        self._clock.run()
        counted = self._waits[int(WARM_UP * len(self._waits)) :]
        return sum(counted) / len(counted)

    def _later(self, seconds: float, call: Callable[[Any], None], argument: Any) -> None:
        self._clock.at(self._clock.now + seconds, call, argument)

    def _poll(self, of: tuple[_Orchestrator, int, Random]) -> None:
        orchestrator, index, jitter = of
        orchestrator.poll(index, self._servers[index].meter)
        if self._left:
            self._later(POLL_S * jitter.uniform(0.8, 1.2), self._poll, of)

    def _arrive(self, _: None) -> None:
        self._left -= 1
        site, random = self._site, self._random
        between_s = SERVICE_S / (site.load * site.workers)
        orchestrator = random.choice(self._orchestrators)
        service_s, pause_s = _lognormal(random), random.expovariate(1 / between_s)
        prompt: Any = _Prompt(service_s)
        self._send(orchestrator, orchestrator.policy.choose(prompt, orchestrator.workers), service_s)
        if self._left:
            self._later(pause_s, self._arrive, None)

    def _send(self, orchestrator: _Orchestrator, choice: Choice[Any], service_s: float) -> None:
        index, now = choice.worker.slot, self._clock.now
        server = self._servers[index]
        begin = max(now, server.free_at)
        self._waits.append(begin - now)
        server.free_at = begin + service_s
        server.legs += 1
        server.meter.begin(orchestrator.sender)
        orchestrator.workers[index].count_leg(1)
        self._clock.at(server.free_at, self._answer, (orchestrator, choice))

    def _answer(self, of: tuple[_Orchestrator, Choice[Any]]) -> None:
        orchestrator, choice = of
        index = choice.worker.slot
        server = self._servers[index]
        choice.ended(Outcome(End.ANSWERED, self._clock.now))
        server.legs -= 1
        orchestrator.note_answer(index, server.meter)
        server.meter.end(orchestrator.sender)


def mean_wait_s(site: Site, view: View, seed: int) -> float:
    return Run(site, view, seed).run()


def _address(index: int) -> WorkerAddress:
    return WorkerAddress(
        name=f"m/prefill/{index}",
        model="m",
        served_model="m",
        role="prefill",
        url="http://h:1",
        host="h",
        port=1,
        side_channel_port=None,
        is_managed=False,
    )


def _policy(name: str, seed: int, clock: VirtualClock) -> Policy:
    context = Context("m", "prefill", Random(seed), clock.time)
    return POLICIES[name].make(context)


def _lognormal(random: Random) -> float:
    sigma = math.sqrt(math.log(1 + SPREAD**2))
    return SERVICE_S * math.exp(random.gauss(0.0, sigma) - sigma**2 / 2)
