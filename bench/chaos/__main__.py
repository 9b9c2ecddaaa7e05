"""This breaks what can break, under load, and tells whether what is promised holds.

    make chaos                                      # all of it; the table of docs/reliability.md
    make chaos ARGS="--quick"                       # a part of it with fewer requests, for CI
    make chaos ARGS="--only workers-kill cuts --requests 500"
    make chaos ARGS="--streams mux"                 # many requests on one connection to each worker

or `.venv/bin/python -m bench.chaos [OPTIONS]`. Four simulated prefill and four simulated decode workers, the
orchestrator and `baton up` are processes of their own; every answer is known beforehand and judged word for
word. The exit code is 1 if something does not hold. Times are figures of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import uvloop

from bench.chaos.hostile import freeze, poison
from bench.chaos.keys import rotated
from bench.chaos.kills import (
    Scale,
    launcher_stopped_and_killed,
    launcher_terminated,
    process,
    rolling,
    workers,
)
from bench.chaos.limits import descriptors, memory
from bench.chaos.report import Outcome, document_of, lines_of, table
from bench.chaos.site import Pools
from bench.chaos.streams import amplification, cancels, cuts
from bench.chaos.times import times
from bench.shared import record
from bench.shared.command import add_streams, parser, run, use_streams
from bench.shared.processes import Failed, raise_file_limit
from bench.shared.verdict import Verdict

RESULTS = record.RESULTS / "chaos.json"
PACKAGES = ("baton-serve", "uvicorn", "uvloop", "httptools")
FULL = Scale(requests=2000, clients=32, cancels=2000, cuts=300, outage_s=10.0, seed=1)
QUICK = Scale(requests=200, clients=32, cancels=200, cuts=20, outage_s=10.0, seed=1)


@dataclass(frozen=True)
class Scenario:
    name: str
    run: Callable[[Pools, Scale], Awaitable[list[Verdict]]]
    is_quick: bool = True


SCENARIOS = [
    Scenario("cancels", cancels),
    Scenario("workers-kill", partial(workers, number=signal.SIGKILL)),
    Scenario("workers-term", partial(workers, number=signal.SIGTERM), is_quick=False),
    Scenario("workers-stop", partial(workers, number=signal.SIGSTOP)),
    Scenario("workers-rolling", rolling, is_quick=False),
    Scenario("process-kill", partial(process, number=signal.SIGKILL)),
    Scenario("process-term", partial(process, number=signal.SIGTERM)),
    Scenario("process-stop", partial(process, number=signal.SIGSTOP), is_quick=False),
    Scenario("launcher-term", launcher_terminated),
    Scenario("launcher-stop-kill", launcher_stopped_and_killed, is_quick=False),
    Scenario("key-rotated", rotated),
    Scenario("engine-freeze", freeze),
    Scenario("poison", poison),
    Scenario("cuts", cuts),
    Scenario("descriptors", descriptors),
    Scenario("memory", memory),
    Scenario("amplification", amplification, is_quick=False),
    Scenario("times", times, is_quick=False),
]


async def chaos(scenarios: Sequence[Scenario], scale: Scale) -> list[Outcome]:
    """Show each outcome when it is there. Raises `Failed` if the workers cannot be started."""
    outcomes = []
    async with Pools() as pools:
        for scenario in scenarios:
            outcomes.append(await _outcome(scenario, pools, scale))
            print("\n".join(lines_of(outcomes[-1])), flush=True)
    return outcomes


async def _outcome(scenario: Scenario, pools: Pools, scale: Scale) -> Outcome:
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        verdicts = await scenario.run(pools, scale)
    except Failed as failed:
        verdicts = [Verdict("it comes to its end", str(failed), False)]
        await asyncio.gather(*(worker.restart() for worker in pools.workers))
    return Outcome(scenario.name, verdicts, loop.time() - began)


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    options.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    options.add_argument("--quick", action="store_true", help="fewer requests, no outage, no times")
    options.add_argument("--requests", type=int, help=f"of each load; {FULL.requests:,} if not given")
    options.add_argument("--seed", type=int, default=Random().randrange(1_000_000), help="drawn if not given")
    add_streams(options)
    options.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    return options.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Scenario]:
    if arguments.only:
        return [scenario for scenario in SCENARIOS if scenario.name in arguments.only]
    return [scenario for scenario in SCENARIOS if scenario.is_quick or not arguments.quick]


def scale_of(arguments: argparse.Namespace) -> Scale:
    scale = replace(QUICK if arguments.quick else FULL, seed=arguments.seed)
    return replace(scale, requests=arguments.requests) if arguments.requests else scale


def main() -> int:
    arguments = arguments_of()
    raise_file_limit()
    scale = asdict(scale_of(arguments)) | {"streams": use_streams(arguments)}
    about = record.about(PACKAGES) | scale
    print(record.listed(about["machine"] | about["versions"] | scale), "\n", flush=True)
    outcomes = uvloop.run(chaos(chosen(arguments), scale_of(arguments)))
    print(f"\n{table(outcomes)}\n\n{arguments.output}")
    record.write(arguments.output, {**about, "outcomes": [document_of(outcome) for outcome in outcomes]})
    return 0 if all(verdict.holds is not False for outcome in outcomes for verdict in outcome.verdicts) else 1


if __name__ == "__main__":
    run("chaos", main)
