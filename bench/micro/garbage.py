"""This measures what the collector's policy is worth (orchestrator/loop/garbage.py), and how memory grows.

    python -m bench.micro.garbage [--requests N] [--rounds N]

In-process, without the kernel's part, as in hot_path.py, each case in a process of its own: CPU per request,
how long collections held the event loop at worst, and how the process grew per 10,000 requests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import uvloop

from bench.micro.hot_path import measure
from bench.shared.command import parser
from bench.shared.figures import aligned, in_rounds
from bench.shared.processes import ROOT, python
from orchestrator.loop import garbage

CASES: dict[str, Callable[[], object]] = {"policy": garbage.tune, "Python's defaults": gc.collect}
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Figures:
    """A case has these figures in a round."""

    cpu_us: float  # per request
    longest_ms: float  # of the collections
    collections: int
    growth_kb: float  # of the resident memory, per 10,000 requests after the first tenth


class Pauses:
    """Every collection is timed from now on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self._began)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def run_case(name: str, requests: int) -> Figures:
    """Measure a case; this must be done in a fresh process."""
    CASES[name]()
    warm_up = requests // 10
    uvloop.run(measure(warm_up, 1))
    pauses, before = Pauses(), resident_bytes()
    spent = uvloop.run(measure(requests, 1))
    growth = (resident_bytes() - before) / requests * 10_000 / 1024
    return Figures(spent, max(pauses.seconds, default=0.0) * 1e3, len(pauses.seconds), growth)


def in_process(name: str, requests: int) -> Figures:
    argv = python("-m", "bench.micro.garbage", "--case", name, "--requests", str(requests))
    return Figures(**json.loads(subprocess.check_output(argv, cwd=ROOT)))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=200_000, help="per round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.case:
        print(json.dumps(asdict(run_case(given.case, given.requests))))
        return
    found = in_rounds(list(CASES), given.rounds, lambda name: in_process(name, given.requests))
    print(f"{given.requests} requests, median of {given.rounds} rounds")
    lines = [["", "CPU us/request", "longest ms", "collections", "KB/10,000 requests"]]
    for name, figures in found.items():
        cpu, longest, count, growth = map(statistics.median, zip(*map(astuple, figures), strict=True))
        lines.append([name, f"{cpu:.1f}", f"{longest:.2f}", f"{count:.0f}", f"{growth:.0f}"])
    print("\n".join(aligned(lines)))


if __name__ == "__main__":
    main()
