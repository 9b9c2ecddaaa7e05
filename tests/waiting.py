"""Waiting for events with a generous limit, and asking what still runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

LIMIT_S = 60.0
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Ask `condition` until it has a true value, and return that; fail after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s} s for: {what}"
        time.sleep(0.02)
    return value


def wait_until_gone(pids: Iterable[int], limit_s: float = LIMIT_S) -> None:
    wait_for(lambda: not any(map(is_running, pids)), "the end of all processes", limit_s)


def is_running(pid: int) -> bool:
    """Zombies do not run: in a container there may be nobody to reap orphans."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def running_with(text: str) -> set[int]:
    """Processes whose command line holds `text`."""
    found = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(cmdline.parent.name)
        try:
            if text.encode() in cmdline.read_bytes() and is_running(pid):
                found.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
