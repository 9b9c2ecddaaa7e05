"""Baton beside the routers that do the same job, on the same machine, in one run.

    make bench                                   # all of it, close to half an hour
    make bench ARGS="--quick"                    # two rounds of one second
    make bench ARGS="--only small sse --routers baton vllm-router nginx --rounds 9"

or, with the environments of `make bench` in place, `.venv/bin/python -m bench.compare [OPTIONS]`.

For each workload two mock workers are started, which answer at once, and the routers, pinned to one core;
the load and the workers are on another one. (Where several processes are compared with one, "scale", routers
may use both.) In each round every router gets the load for a few seconds while the others are idle. One
table per workload is printed: medians of the rounds, and the spread of the first figure. CPU is user and
system time of the router's whole process tree, per request or per streamed event. Only its ratios can be
compared between runs: requests per second and latencies depend on what else the machine does.

A router whose requests fail, or that is not installed, has a row with the reason and no figure. At the end
come the goals as ratios within this run. The result is also written as JSON, with a plot beside it.

Needed beside Python: wrk for the load, and nginx for its row (Debian: apt-get install wrk nginx-light). The
peers are installed by `make bench` from bench/compare/peers.txt into .venv-bench-peers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.compare.cluster import share_cores
from bench.compare.comparison import Row, compare
from bench.compare.goals import GOALS, outcome
from bench.compare.plot import save_plot
from bench.compare.report import goals_table, outcome_document, table, workload_document
from bench.compare.routers import ROUTERS, versions
from bench.compare.workloads import WORKLOADS
from bench.shared.machine import machine
from bench.shared.processes import ROOT, raise_file_limit

RESULTS = ROOT / "bench/results"


Measured = dict[str, dict[str, Row]]  # by workload, by router


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stop what was started
    document = _about(arguments)
    measured = _measure(arguments, document)
    outcomes = [outcome(goal, measured) for goal in GOALS]
    print(goals_table(outcomes))
    document["goals"] = [outcome_document(one) for one in outcomes]
    _write(document, arguments.output)
    if not any(row.samples for rows in measured.values() for row in rows.values()):
        _say("nothing was measured")
        return 1
    plot = arguments.output.with_suffix(".svg")
    save_plot(document["workloads"], plot)
    print(f"\n{arguments.output} and {plot.name}")
    return 0


def _measure(arguments: argparse.Namespace, document: dict[str, Any]) -> Measured:
    """Print each workload's table and write what there is so far: the rest may be interrupted."""
    raise_file_limit()
    cores = share_cores()
    if cores.router == cores.other:
        _say("only one core: the load takes time from the routers, expect wide spreads")
    routers = _chosen(arguments.routers, ROUTERS)
    options = {"cores": cores, "rounds": arguments.rounds, "seconds": arguments.seconds}
    measured: Measured = {}
    for workload in _chosen(arguments.only, WORKLOADS):
        rows = compare(workload, routers, **options, say=_say)
        measured[workload.name] = {row.router: row for row in rows}
        print(f"\n{table(workload, rows)}\n", flush=True)
        document["workloads"].append(workload_document(workload, rows))
        _write(document, arguments.output)
    return measured


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [workload.name for workload in WORKLOADS]
    routers = [router.name for router in ROUTERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--routers", nargs="+", choices=routers, metavar="ROUTER", help=", ".join(routers))
    parser.add_argument("--rounds", type=_positive, help="default: 5, or 2 with --quick")
    parser.add_argument(
        "--seconds",
        type=_positive,
        help="of load, five times that for latency; default: 2, or 1 with --quick",
    )
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--output", type=Path, help="the JSON file; default: bench/results/compare-DATE.json")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (1 if arguments.quick else 2)
    arguments.output = arguments.output or RESULTS / f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _chosen(names: list[str] | None, everything: list[Any]) -> list[Any]:
    return [one for one in everything if names is None or one.name in names]


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "workloads": [],
        "goals": [],
    }


def _write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
