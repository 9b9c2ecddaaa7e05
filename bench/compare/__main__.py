"""This compares Baton with the routers that do the same job, on the same machine, in one run.

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

The mock workers speak HTTP, and serve many requests on one connection to whoever asks for that: the rows
`baton-mux`. All other rows have a connection for each request that is under way. A worker's streams get their
events in steps, all at the same time, as an engine makes them.

A router whose requests fail, or that is not installed, has a row with the reason and no figure. At the end
come the goals as ratios within this run. The result is also written as JSON, with a plot beside it.

Needed beside Python: wrk for the load, and nginx for its row (Debian: apt-get install wrk nginx-light). The
peers are installed by `make bench` from bench/compare/peers.txt into .venv-bench-peers.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.compare.comparison import Row, compare
from bench.compare.goals import GOALS, outcome
from bench.compare.plot import save_plot
from bench.compare.report import goals_table, outcome_document, table, workload_document
from bench.compare.routers import ROUTERS, versions
from bench.compare.workloads import WORKLOADS
from bench.shared import record
from bench.shared.command import measured, parser, positive, run
from bench.shared.cores import share_cores
from bench.shared.processes import raise_file_limit

Measured = dict[str, dict[str, Row]]  # by workload, by router


def main() -> int:
    options = _options()
    document = {
        **record.about(()),
        "versions": versions(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "workloads": [],
        "goals": [],
    }
    rows = _measure(options, document)
    outcomes = [outcome(goal, rows) for goal in GOALS]
    print(goals_table(outcomes))
    document["goals"] = [outcome_document(one) for one in outcomes]
    record.write(options.output, document)
    if not any(row.samples for by_router in rows.values() for row in by_router.values()):
        _say("nothing was measured")
        return 1
    plot = options.output.with_suffix(".svg")
    save_plot(document["workloads"], plot)
    print(f"\n{options.output} and {plot.name}")
    return 0


def _measure(options: Any, document: dict[str, Any]) -> Measured:
    """Print each workload's table and write what there is so far: the rest may be interrupted."""
    raise_file_limit()
    cores = share_cores()
    if cores.router == cores.other:
        _say("only one core: the load takes time from the routers, expect wide spreads")
    routers = _chosen(options.routers, ROUTERS)
    found: Measured = {}
    for workload in _chosen(options.only, WORKLOADS):
        rows = compare(
            workload, routers, cores=cores, rounds=options.rounds, seconds=options.seconds, say=_say
        )
        found[workload.name] = {row.router: row for row in rows}
        print(f"\n{table(workload, rows)}\n", flush=True)
        document["workloads"].append(workload_document(workload, rows))
        record.write(options.output, document)
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> Any:
    options = parser(__doc__)
    workloads, routers = ([one.name for one in all_of] for all_of in (WORKLOADS, ROUTERS))
    add = options.add_argument
    add("--only", nargs="+", choices=workloads, metavar="WORKLOAD", help=", ".join(workloads))
    add("--routers", nargs="+", choices=routers, metavar="ROUTER", help=", ".join(routers))
    return measured(options, "compare", "of load, five times that for latency", positive)


def _chosen(names: list[str] | None, everything: list[Any]) -> list[Any]:
    return [one for one in everything if names is None or one.name in names]


if __name__ == "__main__":
    run("compare", main)
