"""A row is a process that `baton up` has started, a worker that the orchestrator knows, or both in one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from launch.remote import AnyAdmin, Failed, Run, connect_to, find_run, named_admin

if TYPE_CHECKING:
    from launch.local.run_state import ProcessEntry

UP: Final = "ready"  # of a process: what is said of it otherwise counts more than what the orchestrator says

# What `-o json` has of each row, in this order. Times are in seconds, `since` by `time.time()`.
FIELDS: Final = (
    "name",
    "model",
    "role",
    "url",
    "state",
    "since",
    "pid",
    "process_state",
    "restarts",
    "log",
    "is_drained",
    "is_slow",
    "in_flight",
    "seats",
    "share",
    "rate",
    "first_byte_p50",
    "first_byte_p99",
    "inter_token_p50",
    "inter_token_p99",
    "served",
    "errors",
    "retries",
    "transfers",
    "last_error",
)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Rows come from the state of a run, from an admin listener, or from both."""

    run: Run | None
    admin: AnyAdmin | None
    problem: str | None  # why there is no admin listener to ask


def find_source(arguments: argparse.Namespace) -> Source:
    """Return where rows come from. Raises `Failed` if nothing runs."""
    admin = named_admin(arguments)
    if admin is not None:
        return Source(None, admin, None)
    run = find_run(arguments)
    try:
        return Source(run, connect_to(run), None)
    except Failed as error:
        return Source(run, None, str(error))


def rows_of(run: Run | None, workers: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return all rows: first the processes of the run, in its order, then workers that it has not started."""
    left = list(workers)
    rows: list[Row] = []
    for entry in () if run is None else run.state.processes:
        known = [worker for worker in left if _is_of(worker, entry)]
        left = [worker for worker in left if worker not in known]
        rows += [_row(entry, worker) for worker in known] or [_row(entry, None)]
    return rows + [_row(None, worker) for worker in left]


def _is_of(worker: Mapping[str, Any], entry: ProcessEntry) -> bool:
    address = worker["address"]
    return (address["role"], address["url"]) == (entry.role, entry.url)


def _row(entry: ProcessEntry | None, worker: Mapping[str, Any] | None) -> Row:
    row: Row = dict.fromkeys(FIELDS)
    if worker is not None:
        address = worker["address"]
        row |= {name: address[name] for name in ("name", "model", "role", "url")}
        row |= {name: worker.get(name) for name in FIELDS if name in worker}
    if entry is not None:
        row |= _of_process(entry, row)
    return row


def _of_process(entry: ProcessEntry, row: Row) -> Row:
    counts = row["state"] is None or entry.state != UP
    return {
        "name": row["name"] or entry.name,
        "role": entry.role,
        "url": entry.url,
        "state": entry.state if counts else row["state"],
        "since": entry.since if counts else row["since"],
        "pid": entry.pid,
        "process_state": entry.state,
        "restarts": entry.restarts,
        "log": entry.log,
    }


# --- as text --------------------------------------------------------------------------------------


def ago(since: float | None, now: float) -> str:
    """Return how long ago a moment was, in one unit."""
    if since is None:
        return ""
    seconds = max(0, int(now - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def milliseconds(low: float | None, high: float | None) -> str:
    """Return two times, given in seconds, as milliseconds; nothing if they are not known."""
    return "" if low is None or high is None else f"{_short(low * 1e3)}/{_short(high * 1e3)}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def seats(row: Row) -> str:
    """Return how many requests a worker serves, of how many at most."""
    if row["in_flight"] is None:
        return ""
    return f"{row['in_flight']}/{row['seats']}" if row["seats"] else str(row["in_flight"])


def state(row: Row) -> str:
    """Return the state, and what is remarkable beside it."""
    more = [
        word
        for word, is_so in (
            ("slow", row["is_slow"]),
            ("drained", row["is_drained"] and row["state"] != "draining"),
        )
        if is_so
    ]
    share = row["share"]
    if share is not None and share < 0.995:
        more.append(f"{share:.0%}")
    return " ".join([str(row["state"]), *more])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if value == int(value) else f"{value:.1f}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows with their cells below each other; the first one has the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
