"""`python -m bench.scaling.many` runs the registry, admission, policies and planner with a thousand workers.

16 processes serve a million requests in virtual time, or as many as `--requests` says. Measured is the CPU
time that it takes to choose the workers of one request, that of a report to the planner of workers with its
decision, and memory.
"""

from __future__ import annotations

import argparse
import resource
import time
from random import Random
from typing import Final

from launch.simulate.models import engine_models
from launch.simulate.scaler import Scaler
from launch.simulate.site import Conditions, Plans, Site
from launch.simulate.trace import Arrival
from launch.simulate.view import SimulatedRequest
from orchestrator.config.options import Config
from orchestrator.routing.plan import Plan
from orchestrator.routing.planner import Planner
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools

PREFILL_SHARE: Final = 0.5  # of the workers
EACH_S: Final = 8.0  # a prefill worker gets a prompt in so long on average


class Timed(Plans):
    """It measures how long a planner takes."""

    calls = 0
    seconds = 0.0

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def plan(self, request: SimulatedRequest, pools: Pools, whole_reason: str | None) -> Plan:
        began = time.process_time()
        plan = self._planner.plan(request, pools, whole_reason)
        Timed.seconds += time.process_time() - began
        Timed.calls += 1
        return plan

    def hear(self, role: Role, note: bytes) -> None:
        self._planner.hear(role, note)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.scaling.many", description=__doc__)
    parser.add_argument("--workers", type=int, default=1000, help="default: 1000")
    parser.add_argument("--processes", type=int, default=16, help="default: 16")
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--policy", default="prefix", help="of prefill workers; default: prefix")
    arguments = parser.parse_args()
    prefill = round(arguments.workers * PREFILL_SHARE)
    config = _config(prefill, arguments.workers - prefill, arguments.processes, arguments.policy)
    before_mb = _memory_mb()
    began = time.process_time()
    site = _site(config)
    made_s = time.process_time() - began
    scaler = _scaler(site, config)
    began = time.process_time()
    site.run(_arrivals(arguments.requests, prefill / EACH_S))
    whole_s = time.process_time() - began
    served = sum(not job.is_refused for job in site.jobs)
    print(f"{arguments.workers} workers, {arguments.processes} processes, {served:,} requests served")
    print(f"to choose workers: {Timed.seconds / Timed.calls * 1e6:.0f} us of CPU a request")
    print(f"to report and decide: {scaler.spent_s / scaler.reports * 1e3:.2f} ms a report")
    print(f"all of the simulation: {whole_s / served * 1e6:.0f} us a request; made in {made_s:.2f} s")
    print(f"memory: {_memory_mb() - before_mb:.0f} MiB, at most")
    return 0


def _config(prefill: int, decode: int, processes: int, policy: str) -> Config:
    pools = {"prefill": prefill, "decode": decode}
    model = {
        role: {"engine": "sim", "replicas": {"min": count, "max": count}} for role, count in pools.items()
    }
    return Config.model_validate(
        {
            "models": [{"name": "m", **model}],
            "routing": {"prefill": policy},
            "orchestrator": {"processes": processes},
            "scaling": {},
        }
    )


def _site(config: Config) -> Site:
    (model,) = config.models
    return Site(config, model, config.routing, engine_models(model), 512, 0, Conditions(), Timed)


class _TimedScaler(Scaler):
    spent_s = 0.0
    reports = 0

    def _look(self, _: object) -> None:
        began = time.process_time()
        super()._look(_)
        self.spent_s += time.process_time() - began
        self.reports += 1


def _scaler(site: Site, config: Config) -> _TimedScaler:
    assert config.scaling is not None  # for the type checker
    return _TimedScaler(site, config, config.models[0], config.scaling, 60.0)


def _arrivals(count: int, rate: float) -> list[tuple[float, Arrival]]:
    """Return requests of many conversations: some share what they begin with."""
    random = Random("many")  # no secret
    found: list[tuple[float, Arrival]] = []
    at_s = 0.0
    for index in range(count):
        at_s += random.expovariate(rate)
        prompt = round(random.lognormvariate(7.5, 1.0)) + 16
        talk = random.randrange(max(1, count // 5))
        blocks = [talk * 1000 + place for place in range(prompt // 512)]
        found.append((at_s, Arrival(index, at_s, prompt, random.randint(20, 300), blocks)))
    return found


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
