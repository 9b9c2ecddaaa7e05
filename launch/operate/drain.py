"""`baton drain` and `baton undrain` take workers out of service, and let them back."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from launch.exits import Exit
from launch.remote import AnyAdmin, Failed, Mistaken, connect, say, understood, unknown, worker_path

POLL_S = 0.2
_SERVING = ("ready", "suspect", "probing")

Row = dict[str, Any]


def drain(arguments: argparse.Namespace) -> int:
    """Drain workers, and wait for their requests if that is wanted. Raises `Failed`."""
    _check_named(arguments)
    with connect(arguments) as admin:
        rows = _chosen(admin, arguments.names)
        changed = [admin.post(worker_path(_name(row), "drain")) for row in rows]
        _note_who_is_left(admin, changed)
        if arguments.wait:
            changed = _wait_free(admin, rows, arguments.timeout_s)
        _show(arguments, changed)
    return Exit.OK


def undrain(arguments: argparse.Namespace) -> int:
    """Let workers serve again. Raises `Failed`."""
    _check_named(arguments)
    with connect(arguments) as admin:
        rows = _chosen(admin, arguments.names)
        _show(arguments, [admin.post(worker_path(_name(row), "undrain")) for row in rows])
    return Exit.OK


def _check_named(arguments: argparse.Namespace) -> None:
    if not arguments.names:
        raise Mistaken("name the workers, as `baton ps` shows them, or the one at --url by --self")


def _chosen(admin: AnyAdmin, names: Sequence[str]) -> list[Row]:
    """Return the workers with these names; of one that has data-parallel engines, all of them."""
    rows: list[Row] = admin.get("/admin/workers")
    with understood(admin.url):
        known = [(row, {_name(row), _without_rank(row)}) for row in rows]
    chosen: list[Row] = []
    for name in dict.fromkeys(names):
        found = [row for row, called in known if name in called]
        if not found:
            raise Failed(unknown("worker", name, [_name(row) for row in rows]))
        chosen += found
    return chosen


def _name(row: Row) -> str:
    name: str = row["address"]["name"]
    return name


def _without_rank(row: Row) -> str:
    rank = row["address"]["rank"]
    return _name(row) if rank is None else _name(row).removesuffix(f".dp{rank}")


def _pool_of(row: Row) -> str:
    return f"{row['address']['model']}/{row['address']['role']}"


def _note_who_is_left(admin: AnyAdmin, changed: Iterable[Row]) -> None:
    """Say which pools nobody serves any more."""
    rows = admin.get("/admin/workers")
    for pool in dict.fromkeys(map(_pool_of, changed)):
        if not any(row["state"] in _SERVING for row in rows if _pool_of(row) == pool):
            say(f"note: no worker of {pool} is left that serves: requests may wait or fail")


def _wait_free(admin: AnyAdmin, chosen: Sequence[Row], timeout_s: float) -> list[Row]:
    from orchestrator.config.printing import counted

    names = [_name(row) for row in chosen]
    end = time.monotonic() + timeout_s
    while True:
        rows = [row for row in admin.get("/admin/workers") if _name(row) in names]
        left = sum(row["in_flight"] for row in rows)
        if not left:
            return rows
        if time.monotonic() > end:
            raise Failed(
                f"{counted(left, 'request')} did not end within {timeout_s:g} s; "
                f"{', '.join(names)} {'stays' if len(names) == 1 else 'stay'} drained"
            )
        time.sleep(POLL_S)


def _show(arguments: argparse.Namespace, rows: Iterable[Row]) -> None:
    from orchestrator.config.printing import counted, one_line

    if arguments.output == "json":
        print(json.dumps([_described(row) for row in rows], indent=2))
        return
    for row in rows:
        print(one_line(f"{_name(row)}: {_state(row)}, {counted(row['in_flight'], 'request')}"))


def _state(row: Row) -> str:
    """Return the state, and what comes next where it looks like a fault: who was undrained is suspect until a
    probe.
    """
    if row["state"] == "suspect" and not row["is_drained"]:
        return "suspect (it is probed now, and serves if that finds it well)"
    state: str = row["state"]
    return state


def _described(row: Row) -> Row:
    return {"name": _name(row)} | {key: row[key] for key in ("state", "is_drained", "in_flight")}
