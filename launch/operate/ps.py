"""`baton ps` lists the processes and workers of a run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from launch.exits import Exit
from launch.operate.rows import (
    Row,
    Source,
    ago,
    find_source,
    milliseconds,
    number,
    rows_of,
    seats,
    state,
    table,
)
from launch.remote import Failed, Run, say, understood

TITLES: Final = (
    "NAME", "STATE", "SINCE", "PID", "RESTARTS", "SEATS", "RATE/S", "FIRST BYTE MS", "TOKEN MS", "ERRORS"
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the rows. Raises `Failed` if nothing runs; what cannot be known is said on stderr."""
    source = find_source(arguments)
    if arguments.output == "names" and source.run is not None:
        return _print_names(entry.name for entry in source.run.state.processes)
    workers, processes, problem = _asked(source)
    with understood("the admin listener"):
        rows = rows_of(source.run, workers)
    if problem is not None:
        if source.run is None:
            raise Failed(problem)
        say(f"note: {problem}")
    if arguments.output == "names":
        return _print_names(row["name"] for row in rows)
    if arguments.output == "json":
        print(json.dumps(_document(source.run, rows, processes), indent=2))
    else:
        _print(source.run, rows, processes)
    return Exit.OK


def _print_names(names: Iterable[str]) -> int:
    """Print a name a line, as shells need them that complete words; of a run without asking anybody."""
    from orchestrator.config.printing import one_line

    for name in names:
        print(one_line(name))
    return Exit.OK


def _asked(source: Source) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]:
    """Return the workers and data-plane processes that the orchestrator knows; or why it tells nothing."""
    if source.admin is None:
        return [], [], source.problem
    with source.admin as admin:
        try:
            return admin.get("/admin/workers"), admin.get("/admin/processes"), None
        except Failed as error:
            return [], [], str(error)


def _document(run: Run | None, rows: Sequence[Row], processes: Sequence[Any]) -> dict[str, Any]:
    return {"run": described(run), "rows": rows, "data_processes": processes}


def described(run: Run | None) -> dict[str, Any] | None:
    """Return what JSON tells of a run."""
    if run is None:
        return None
    found = run.state
    return {
        "directory": str(run.directory),
        "pid": found.pid,
        "started": found.started,
        "config": found.config,
        "url": found.url,
        "admin": found.admin,
        "is_ready": found.is_ready,
        "operation": found.operation,
    }


def _print(run: Run | None, rows: Sequence[Row], processes: Sequence[Any]) -> None:
    from orchestrator.config.printing import one_line

    now = time.time()
    if run is not None:
        doing = f", {run.state.operation}" if run.state.operation else ""
        doing = doing or ("" if run.state.is_ready else ", still starting")
        up = f"up {ago(run.state.started, now)}, process {run.state.pid}, {run.state.config}{doing}"
        print(one_line(f"{run.state.url}  {up}"))
    lines = [TITLES, *([one_line(cell) for cell in _cells(row, now)] for row in rows)]
    print("\n".join(table(lines)))
    for told in _remarks(rows, processes):
        print(one_line(told))


def _cells(row: Row, now: float) -> Sequence[str]:
    return (
        row["name"],
        state(row),
        ago(row["since"], now),
        number(row["pid"]),
        number(row["restarts"]),
        seats(row),
        number(row["rate"]),
        milliseconds(row["first_byte_p50"], row["first_byte_p99"]),
        milliseconds(row["inter_token_p50"], row["inter_token_p99"]),
        number(row["errors"]),
    )


def _remarks(rows: Sequence[Row], processes: Sequence[Any]) -> Iterator[str]:
    """Say what does not fit into a row: processes of the data plane, and why a worker does not serve."""
    if len(processes) > 1:
        told = ", ".join(f"{p['index']} ({p['state']}, pid {p['pid']}, {p['in_flight']})" for p in processes)
        yield f"data-plane processes, with requests in flight: {told}"
    for row in rows:
        if row["last_error"] and row["state"] != "ready":
            yield f"{row['name']}: {row['last_error']}"
