"""A command that stands still is ended, and begun anew once: a compiler that waits for itself, say.

This imports the standard library only, as `launch/compile.py` does.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import kill
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Nothing was computed for so long: even at the lowest priority a process gets some hundredth of a core.
STILL_S = 120.0
TRIES = 2
_DEEPEST = 64  # generations


class _Process(NamedTuple):
    pid: int
    parent: int
    ticks: int  # computed, by children that have ended too
    state: str  # as ps tells it: its name, S for one that waits


def run_watched(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    output: BinaryIO | None,
    still_s: float = STILL_S,
) -> int:
    """Return the exit status of a command, which is negative if it stood still each time.

    What it prints goes to `output`, and what stood still. Its processes are of the caller's group.
    """
    status = -1
    where = subprocess.DEVNULL if output is None else output
    for _ in range(TRIES):
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=where, stderr=where)  # noqa: S603
        try:
            ended = _wait_while_it_works(process, still_s)
        except BaseException:
            _kill_all(process)
            raise
        if ended is not None:
            return ended
        told = _kill_all(process)
        status = -abs(process.returncode)
        if output is not None:
            output.write(f"nothing was computed for {still_s:g} s, ended: {told}\n".encode())
    return status


def _wait_while_it_works(process: subprocess.Popen[bytes], still_s: float) -> int | None:
    """Return the exit status, or None if nothing was computed for `still_s`."""
    before = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(still_s)
        now = _computed(process.pid)
        if now is not None and now == before:
            return None
        before = now


def _computed(pid: int) -> int | None:
    """Return what a process and its descendants have computed, in ticks; None where that is not told."""
    tree = _tree(pid)
    return sum(member.ticks for member in tree) if tree else None


def _kill_all(process: subprocess.Popen[bytes]) -> str:
    """End a process and its descendants, and say what they were."""
    tree = _tree(process.pid)
    for member in tree:
        with suppress(ProcessLookupError):
            kill(member.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    return ", ".join(member.state for member in tree)


def _tree(pid: int) -> list[_Process]:
    """Return a process and its descendants, as far as the system tells."""
    found: dict[int, _Process] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            process = _parsed(stat.read_text(errors="replace"))
            found[process.pid] = process
    return [process for process in found.values() if _descends(process, pid, found)]


def _parsed(stat: str) -> _Process:
    start, _, rest = stat.rpartition(")")
    pid, _, name = start.partition(" (")
    fields = rest.split()
    return _Process(int(pid), int(fields[1]), sum(map(int, fields[11:15])), f"{name} {fields[0]}")


def _descends(process: _Process, pid: int, found: Mapping[int, _Process]) -> bool:
    for _ in range(_DEEPEST):
        if process.pid == pid:
            return True
        if process.parent not in found:
            return False
        process = found[process.parent]
    return False
