"""What the collector's policy (orchestrator/loop/garbage.py) is worth, and whether memory stays level
under it.

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
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from bench.micro.hot_path import measure
from orchestrator.loop import garbage

CASES = {"policy": garbage.tune, "Python's defaults": gc.collect}
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Figures:
    cpu_us: float  # per request
    longest_ms: float  # of the collections
    collections: int
    growth_kb: float  # of the resident memory, per 10,000 requests after the first tenth


class Pauses:
    """Times every collection from now on."""

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
    """To be run in a fresh process."""
    CASES[name]()
    warm_up = requests // 10
    uvloop.run(measure(warm_up, 1))
    pauses, before = Pauses(), resident_bytes()
    spent = uvloop.run(measure(requests, 1))
    growth = (resident_bytes() - before) / requests * 10_000 / 1024
    return Figures(spent, max(pauses.seconds, default=0.0) * 1e3, len(pauses.seconds), growth)


def in_process(name: str, requests: int) -> Figures:
    argv = [sys.executable, "-m", "bench.micro.garbage", "--case", name, "--requests", str(requests)]
    return Figures(**json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200_000, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(asdict(run_case(options.case, options.requests))))
        return
    rounds = [{name: in_process(name, options.requests) for name in CASES} for _ in range(options.rounds)]
    print(f"{options.requests} requests, median of {options.rounds} rounds")
    print(f"{'':20}{'CPU us/request':>16}{'longest ms':>12}{'collections':>13}{'KB/10,000 requests':>20}")
    for name in CASES:
        cells = [asdict(figures[name]) for figures in rounds]
        cpu, longest, count, growth = (statistics.median(cell[key] for cell in cells) for key in cells[0])
        print(f"{name:20}{cpu:16.1f}{longest:12.2f}{count:13.0f}{growth:20.0f}")


if __name__ == "__main__":
    main()
