"""`baton logs` prints the logs of a run, and goes on with them through their rotation."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from launch.exits import Exit
from launch.local.run_state import FILE, NoState, RunState, read
from launch.remote import Failed, Run, find_run, say

POLL_S: Final = 0.2
CHUNK: Final = 64 * 1024
MAX_LINE: Final = 64 * 1024  # bytes: a longer line is printed in pieces
_COLOURS: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def run(arguments: argparse.Namespace) -> int:
    """Print logs, of the last run if none is alive. Raises `Failed`."""
    found = find_run(arguments, ended_too=True)
    names = _chosen(found, arguments.names)
    if not found.state.is_alive():
        say(f"note: this run has ended: {found}")
    printer = _Printer([*names], is_json=arguments.output == "json")
    try:
        _print(found, arguments, names, printer)
    finally:
        printer.flush()
    return Exit.OK


def _chosen(found: Run, names: Sequence[str]) -> list[str]:
    found.check_names(names)
    return list(dict.fromkeys(names)) or [entry.name for entry in found.state.processes]


def _print(found: Run, arguments: argparse.Namespace, names: Sequence[str], printer: _Printer) -> None:
    logs = {name: _Log(found.directory / log) for name, log in _files(found.state) if name in names}
    for name, log in logs.items():
        for line in log.last(arguments.lines):
            printer.emit(name, line)
    printer.flush()
    while arguments.follow:
        state = _state(found)
        for name, file in _files(state):
            if name not in logs and not arguments.names:  # it was added since
                logs[name] = _Log(found.directory / file)
        for name, log in logs.items():
            for line in log.more():
                printer.emit(name, line)
        printer.flush()
        if not state.is_alive():
            _print_rest(logs, printer)
            say(f"the run has ended: {found}")
            return
        time.sleep(POLL_S)


def _print_rest(logs: dict[str, _Log], printer: _Printer) -> None:
    for name, log in logs.items():
        for line in (*log.more(), *log.rest()):
            printer.emit(name, line)


def _files(state: RunState) -> list[tuple[str, str]]:
    return [(entry.name, entry.log) for entry in state.processes]


def _state(found: Run) -> RunState:
    try:
        return read(found.directory / FILE)
    except (OSError, NoState) as error:
        raise Failed(f"the run's state cannot be read any more: {error}") from error


class _Printer:
    """It writes lines to stdout: nothing in one steers a terminal, and each says whose it is."""

    def __init__(self, names: Sequence[str], *, is_json: bool) -> None:
        self._is_json = is_json
        self._is_prefixed = len(names) > 1
        self._width = max(map(len, names), default=0)

    def emit(self, name: str, line: bytes) -> None:
        from orchestrator.config.printing import one_line

        text = _COLOURS.sub("", line.decode("utf-8", "replace").rstrip("\r"))
        if self._is_json:
            print(json.dumps({"name": name, "line": text}))
        elif self._is_prefixed:
            print(one_line(f"{name:{self._width}} | ") + one_line(text))
        else:
            print(one_line(text))

    def flush(self) -> None:
        sys.stdout.flush()


class _Log:
    """A log that somebody appends to, and that is rotated: what was in it is then in `LOG.1`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._earlier = path.with_name(f"{path.name}.1")
        self._offset = 0
        self._rotation = self._rotated()
        self._pending = b""

    def last(self, count: int) -> Iterator[bytes]:
        """Return the last lines, also of earlier files; `more` goes on from there."""
        content = _tail(self._path, count)
        self._offset = _size(self._path) if content is None else content[1]
        lines = [] if content is None else content[0]
        number = 1
        while len(lines) < count:
            earlier = _tail(self._path.with_name(f"{self._path.name}.{number}"), count - len(lines))
            if earlier is None:
                break
            lines = earlier[0] + lines
            number += 1
        return iter(lines)

    def more(self) -> Iterator[bytes]:
        """Yield the lines that were ended since."""
        if self._is_rotated():
            yield from self._read(self._earlier)
            self._offset = 0
        yield from self._read(self._path)

    def rest(self) -> Iterator[bytes]:
        """Yield what stands after the last line end."""
        if self._pending:
            yield self._pending
            self._pending = b""

    def _is_rotated(self) -> bool:
        rotation = self._rotated()
        if rotation == self._rotation and _size(self._path) >= self._offset:
            return False
        has_earlier = rotation != self._rotation
        self._rotation = rotation
        if not has_earlier:  # somebody has emptied it
            self._offset = 0
        return has_earlier

    def _rotated(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._earlier)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                while piece := file.read(CHUNK):
                    self._offset += len(piece)
                    *lines, self._pending = (self._pending + piece).split(b"\n")
                    yield from lines
                    if len(self._pending) > MAX_LINE:
                        yield from self.rest()
        except FileNotFoundError:
            return


def _tail(path: Path, count: int) -> tuple[list[bytes], int] | None:
    """Return the last whole lines of a file, and where they end; None if there is no such file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            content = _last_part(file.fileno(), end, count)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Failed(f"{path} cannot be read: {error.strerror}") from error
    *lines, left = content.split(b"\n")
    return (lines[-count:] if count else []), end - len(left)


def _last_part(descriptor: int, end: int, count: int) -> bytes:
    """Return so much of the end of a file that so many lines are in it."""
    content = b""
    start = end
    while start > 0 and content.count(b"\n") <= count:
        size = min(CHUNK, start)
        start -= size
        content = os.pread(descriptor, size, start) + content
    return content


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
