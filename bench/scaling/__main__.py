"""`python -m bench.scaling [--trace-dir DIR]` has workers come and go as `scaling` wants, in virtual time.

Each load is also served by the fewest workers that are always there. The table is in `docs/scaling.md`.
Constants are chosen by `--half first`, which sees nothing but the first half of each trace, and what they are
worth is told by `--half second`: the whole trace is served, and its second half is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from bench.scaling.loads import LOADS
from launch.simulate.experiment import Experiment
from launch.simulate.figures import SPREAD, Slo
from launch.simulate.formats import read_trace
from launch.simulate.scaled import Scaled, scale
from launch.simulate.trace import Trace
from orchestrator.config.options import Config

SHARE: Final = 0.95  # of the requests are to keep the bounds
WARM_UP: Final = 0.1  # of the time is not counted
RATES: Final = {"jsonl": (0.5, 1.0), "csv": (1.0, 2.0)}  # of Mooncake's traces, of Azure's
ROW: Final = "| {} | {:.1%} ± {:.1%} | {:.1f} | {} | {} | {} |"
HEAD: Final = (
    "| load | good | worker-hours | the best constant | ratio | reversals |\n|---|---|---|---|---|---|"
)


class Case(NamedTuple):
    """A load is to keep these bounds."""

    name: str
    trace: Trace
    ttft_s: float
    itl_ms: float
    rate: float
    seeds: range


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__)
    parser.add_argument("--trace-dir", type=Path, help="where Mooncake's and Azure's traces are")
    parser.add_argument(
        "--start-s", type=float, default=60.0, help="a worker takes so long to start; default: 60"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each load; default: 3")
    parser.add_argument("--first-seed", type=int, default=0, help="default: 0")
    parser.add_argument("--half", choices=("first", "second"), help="of each trace; default: all of it")
    parser.add_argument("--only", default="", help="loads whose names have this in them")
    arguments = parser.parse_args()
    print(HEAD)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for case in _cases(arguments.trace_dir, seeds, arguments.half):
        if arguments.only in case.name:
            print(_row(case.name, _found(case, arguments.start_s, arguments.half)), flush=True)
    return 0


def _cases(folder: Path | None, seeds: range, half: str | None) -> Iterator[Case]:
    for name, load in LOADS.items() if half is None else ():  # other seeds are other loads
        for seed in seeds:
            yield Case(f"{name}, seed {seed}", load.trace(seed), 4.0, 60.0, 1.0, range(seed, seed + 1))
    for kind, rates in RATES.items():
        for file in sorted(folder.glob(f"*.{kind}")) if folder is not None else ():
            trace = read_trace(str(file), "m")
            for rate in rates:
                name = f"{file.stem}, rate {rate:g}"
                yield Case(name, first_half(trace) if half == "first" else trace, 10.0, 100.0, rate, seeds)


def first_half(trace: Trace) -> Trace:
    """Return what comes in the first half of the time."""
    middle = max(arrival.at_s for arrival in trace.arrivals) / 2
    arrivals = [arrival for arrival in trace.arrivals if arrival.at_s < middle]
    return Trace(arrivals, trace.block_tokens, trace.resolution_s)


def _found(case: Case, start_s: float, half: str | None) -> Scaled:
    pool = {"engine": "sim", "replicas": {"min": 1, "max": 64}}
    config = Config.model_validate(
        {
            "models": [{"name": "m", "prefill": pool, "decode": {**pool, "seats": 256}}],
            "scaling": {"ttft_p95_s": case.ttft_s, "itl_p95_ms": case.itl_ms},
        }
    )
    left_out = 0.5 if half == "second" else 0.0
    experiment = Experiment(
        config,
        config.models[0],
        case.trace,
        rate=case.rate,
        seeds=len(case.seeds),
        first_seed=case.seeds.start,
        slo=Slo(case.ttft_s, case.itl_ms / 1e3),
        warm_up=max(left_out, WARM_UP),
    )
    return scale(experiment, {"m": config.routing}, start_s, SHARE, left_out)["m"]


def _row(name: str, found: Scaled) -> str:
    best, ratio = "none is enough", "-"
    if found.best is not None and found.ratio is not None:
        best = f"{found.best.prefill}:{found.best.decode}, {found.best_hours:.1f}"
        ratio = f"{found.ratio:.2f}"
    turns = ", ".join(f"{role} {count}" for role, count in found.reversals.items())
    good, spread = found.figures["good"], found.figures.get(f"good{SPREAD}", 0.0)
    return ROW.format(name, good, spread, found.worker_hours, best, ratio, turns)


if __name__ == "__main__":
    raise SystemExit(main())
