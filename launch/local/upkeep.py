"""Logs are kept within bounds, and a disk that is full is said by name."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from launch.local.progress import Progress

WORKERS_FILE = "config.json"  # workers on other machines start by it; it is removed once there are none
LOOK_S = 5.0  # between two looks at the sizes of logs, and at the disk
LEAST_FREE = 1024 * 1024  # bytes: with less, lines are soon lost
_RUN = re.compile(r"run-[0-9]{8}-[0-9]{6}-([0-9]+)")
_CHUNK = 1024 * 1024


class Upkeep:
    """It rotates the logs of a run, and says when their disk is full."""

    def __init__(self, logs: Sequence[Path], max_bytes: int, files: int, progress: Progress) -> None:
        """A log of more than `max_bytes` becomes a file of its own, of which the last `files` are kept; 0
        bytes: as large as it likes.
        """
        self._logs = list(logs)
        self._max_bytes = max_bytes
        self._files = files
        self._progress = progress
        self._next_look = 0.0
        self._is_full = False

    def add(self, log: Path) -> None:
        """Look after one log more."""
        if log not in self._logs:
            self._logs.append(log)

    def tend(self, now: float) -> None:
        """Look after the logs, if it is time. `now` is loop time."""
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        for log in self._logs:
            if self._max_bytes and _size(log) > self._max_bytes:
                self._rotate(log)
        self._look_at_disk()

    def _rotate(self, log: Path) -> None:
        try:
            rotate(log, self._files)
        except OSError as error:
            self._progress.say(f"{log} cannot be rotated: {error.strerror}")

    def _look_at_disk(self) -> None:
        folder = self._logs[0].parent if self._logs else Path()
        is_full = free_bytes(folder) < LEAST_FREE
        if is_full and not self._is_full:
            self._progress.say(f"{no_space(folder)}: lines of the logs are lost until there is")
        elif self._is_full and not is_full:
            self._progress.say(f"there is space again on the disk of {folder}, where the logs go")
        self._is_full = is_full


def no_space(folder: Path) -> str:
    return f"no space is left on the disk of {folder}, where the logs go"


def free_bytes(folder: Path) -> float:
    """Return how many bytes can be written there; infinitely many where nobody tells."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return float("inf")


def rotate(log: Path, files: int) -> None:
    """Move what is in a log to `LOG.1`, and `LOG.1` to `LOG.2`, of `files` at most. Raises `OSError`.

    Whoever writes to it goes on, as it is opened for appending; lines that come in the last microseconds may
    be lost.
    """
    numbered = [log.with_name(f"{log.name}.{number}") for number in range(1, files + 1)]
    for newer, older in reversed([*pairwise(numbered)]):
        if newer.exists():
            newer.replace(older)
    if numbered:
        _copy(log, numbered[0])
    os.truncate(log, 0)


def _copy(log: Path, copy: Path) -> None:
    partial = copy.with_name(f"{copy.name}.part")
    try:
        with log.open("rb") as source, partial.open("wb") as target:
            while piece := source.read(_CHUNK):
                target.write(piece)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(copy)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- runs of long ago ---------------------------------------------------------------------------


def prune(latest: Path, runs: int, max_bytes: int) -> None:
    """Remove the logs of old runs beside `latest`: all but `runs` with that one, and all but the newest that
    have `max_bytes` together. Those that still run stay.
    """
    kept = 1
    used = 0
    for run in sorted(_earlier(latest), key=lambda run: run.name, reverse=True):
        used += sum(_size(file) for file in run.iterdir())
        if (kept >= runs or used > max_bytes) and not _is_running(run):
            with contextlib.suppress(OSError):
                shutil.rmtree(run)
        else:
            kept += 1


def _earlier(latest: Path) -> Iterator[Path]:
    for path in latest.parent.iterdir():
        if path.name != latest.name and _RUN.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def _is_running(run: Path) -> bool:
    """Return whether `baton up` runs on this machine, or workers of the run may still be elsewhere."""
    match = _RUN.fullmatch(run.name)
    return match is not None and (Path(f"/proc/{match[1]}").exists() or (run / WORKERS_FILE).exists())
