"""`python -m bench.scaling [--trace-dir DIR]` has workers come and go as `scaling` wants, in virtual time.

Each load is also served by the fewest workers that are always there. The table is in `docs/scaling.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.scaling.loads import LOADS
from launch.simulate.experiment import Experiment
from launch.simulate.figures import Slo
from launch.simulate.formats import read_trace
from launch.simulate.scaled import Scaled, scale
from launch.simulate.trace import Trace
from orchestrator.config.options import Config

SHARE: Final = 0.95  # of the requests are to keep the bounds
ROW: Final = "| {} | {:.1%} | {:.1f} | {} | {} | {} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__)
    parser.add_argument("--trace-dir", type=Path, help="where Mooncake's traces are")
    parser.add_argument(
        "--start-s", type=float, default=60.0, help="a worker takes so long to start; default: 60"
    )
    parser.add_argument("--seeds", type=int, default=2, help="of each load that is made; default: 2")
    arguments = parser.parse_args()
    print("| load | good | worker-hours | the best constant | ratio | reversals |\n|---|---|---|---|---|---|")
    for name, trace, ttft_s, itl_ms, rate in _cases(arguments.trace_dir, arguments.seeds):
        print(_row(name, _found(trace, ttft_s, itl_ms, rate, arguments.start_s)), flush=True)
    return 0


def _cases(folder: Path | None, seeds: int) -> Iterator[tuple[str, Trace, float, float, float]]:
    for name, load in LOADS.items():
        for seed in range(seeds):
            yield f"{name}, seed {seed}", load.trace(seed), 4.0, 60.0, 1.0
    for file in sorted(folder.glob("*.jsonl")) if folder is not None else ():
        for rate in (0.5, 1.0):
            yield f"{file.stem}, rate {rate:g}", read_trace(str(file), "m"), 10.0, 100.0, rate


def _found(trace: Trace, ttft_s: float, itl_ms: float, rate: float, start_s: float) -> Scaled:
    pool = {"engine": "sim", "replicas": {"min": 1, "max": 64}}
    config = Config.model_validate(
        {
            "models": [{"name": "m", "prefill": pool, "decode": {**pool, "seats": 256}}],
            "scaling": {"ttft_p95_s": ttft_s, "itl_p95_ms": itl_ms},
        }
    )
    slo = Slo(ttft_s, itl_ms / 1e3)
    experiment = Experiment(config, config.models[0], trace, rate=rate, slo=slo)
    return scale(experiment, {"m": config.routing}, start_s, SHARE)["m"]


def _row(name: str, found: Scaled) -> str:
    best, ratio = "none is enough", "-"
    if found.best is not None and found.ratio is not None:
        best = f"{found.best.prefill}:{found.best.decode}, {found.best_hours:.1f}"
        ratio = f"{found.ratio:.2f}"
    turns = ", ".join(f"{role} {count}" for role, count in found.reversals.items())
    return ROW.format(name, found.figures["good"], found.worker_hours, best, ratio, turns)


if __name__ == "__main__":
    raise SystemExit(main())
