"""Kills what a test run has left when the run itself is gone, however it ended.

A process hands its environment on, so a mark in the environment of the run is in everything that comes
from it: in children of children too, in whatever session and group, started by whoever. The reaper holds the
reading end of a pipe whose writing end only the run has. A child that has not yet become another program,
and lacks the mark, has that end as well, so the reaper waits for it. Standard library only, started as
`python -I -S reaper.py MARK`: small and up at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

MARK = "BATON_TEST_RUN"
# Processes that watch their parent end by themselves meanwhile, and tidy up.
GRACE_S = 1.0
POLL_S = 0.05


def start() -> None:
    """Mark what this process starts from now on, and have it killed when this process is gone.

    Called once per process.
    """
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    os.environ[MARK] = uuid4().hex
    os.environ["SPT_NOENV"] = "1"  # setproctitle would write over the environment that /proc shows
    reading, _ = os.pipe()  # neither end is inherited across an exec; the kernel closes the other one
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, os.environ[MARK]],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=unmarked,
        start_new_session=True,  # Ctrl-C is not for it
    )
    process.returncode = 0  # nobody waits for it: it outlives this process
    os.close(reading)


def main(mark: str) -> None:
    sys.stdin.buffer.read()
    wait_until_gone(mark, GRACE_S)
    while left := marked(mark):
        kill(left)
        time.sleep(POLL_S)


def wait_until_gone(mark: str, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while marked(mark) and time.monotonic() < end:
        time.sleep(POLL_S)


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> set[int]:
    """Return the processes that were started with that text in their environment."""
    return {pid for pid, environ in environments() if mark.encode() in environ}


def environments() -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or is not ours
            yield int(path.parent.name), path.read_bytes()


if __name__ == "__main__":
    main(sys.argv[1])
