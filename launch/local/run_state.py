"""`baton up` keeps a file in its run's directory that says what runs, so that other commands find it.

The file is replaced as a whole at every change, and has no secret. It stays after the end: whoever reads it
asks `RunState.is_alive` whether its writer still runs, also if that was killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

FILE: Final = "state.json"
SOCKET: Final = "control"  # beside it: `launch/local/control.py` listens there
VERSION: Final = 1
STOPPING: Final = "stopping"  # the operation of a run that is being stopped
MAX_BYTES: Final = 16 * 1024 * 1024


class ProcessEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry says what is known of one process."""

    name: str  # MODEL/ROLE/INDEX, or "orchestrator"
    role: str
    state: str  # as `launch/local/progress.py` shows it: starting, ready, died, stopping, ...
    since: float  # when it came to that, by `time.time()`
    pid: int | None  # the leader of its group; None if none runs
    restarts: int  # how often it was started again
    log: str  # the file, in the run's directory
    url: str  # where it answers


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """A state says of one run of `baton up` who it is, where it is reached, and what it has started."""

    version: int
    pid: int
    start: str  # tells this process from a later one with its number; see `start_of`
    host: str  # the machine, or container, that the number counts in
    started: float  # by `time.time()`
    config: str  # the path, absolute
    url: str  # of the data plane
    admin: str | None  # URL of the admin listener; None without one
    is_ready: bool  # all was ready once
    operation: str | None  # what an operator has asked for and is under way
    ended: float | None  # when it stopped, by `time.time()`; None while it runs, or if it was killed
    processes: Sequence[ProcessEntry]
    backend: str = "local"  # where the workers are, see `launch/backends`
    admins: Sequence[str] = ()  # those of all orchestrators, the first one's too
    handle: Mapping[str, str] = {}  # by which it ends what is left, should the run be killed

    def is_alive(self) -> bool:
        """Return whether the process that wrote this still runs on this machine."""
        return self.ended is None and self.is_here() and start_of(self.pid) == self.start

    def has_left_workers(self) -> bool:
        """Return whether it was killed while a backend had workers of it, which nobody has ended since."""
        return self.ended is None and bool(self.handle) and not self.is_alive()

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def process(self, name: str) -> ProcessEntry | None:
        return next((entry for entry in self.processes if entry.name == name), None)


class NoState(Exception):
    """A file is no state that can be read; the message says why."""


def start_of(pid: int) -> str | None:
    """Return what tells a process from all others that have, or had, its number; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{fields[19]}"


def read(file: Path) -> RunState:
    """Read a state file. Raises `NoState`, `OSError`."""
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    try:
        state = msgspec.json.decode(content, type=RunState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NoState(f"{file} is not a state of `baton up`: {error}") from error
    if state.version != VERSION:
        raise NoState(f"{file} was written by another version of Baton")
    return state


def write(file: Path, state: RunState) -> None:
    """Replace the file as a whole; nobody but its owner can read it. Raises `OSError`."""
    partial = file.with_name(f"{file.name}.part")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(msgspec.json.format(msgspec.json.encode(state), indent=2))
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class StateWriter:
    """A writer keeps the file of this process's run in step with what runs; a full disk stops nobody."""

    def __init__(
        self,
        directory: Path,
        config: str,
        url: str,
        admins: Sequence[str],
        complain: Callable[[str], None],
        backend: str = "local",
    ) -> None:
        self.handle: Mapping[str, str] = {}
        self._file = directory / FILE
        self._complain = complain
        self._is_failing = False
        self._written: RunState | None = None
        self._state = RunState(
            version=VERSION,
            pid=os.getpid(),
            start=start_of(os.getpid()) or "",
            host=socket.gethostname(),
            started=time.time(),
            config=os.path.abspath(config),
            url=url,
            admin=next(iter(admins), None),
            admins=admins,
            is_ready=False,
            operation=None,
            ended=None,
            processes=(),
            backend=backend,
        )

    def note(
        self, processes: Sequence[ProcessEntry], *, is_ready: bool, operation: str | None = None
    ) -> None:
        """Write what runs, if it has changed."""
        found = tuple(processes)
        self._note(
            replace(self._state, processes=found, is_ready=is_ready, operation=operation, handle=self.handle)
        )

    def end(self, processes: Sequence[ProcessEntry]) -> None:
        """Write that nothing runs any more, here or on a backend."""
        self.handle = {}
        ended = replace(self._state, processes=tuple(processes), operation=None, ended=time.time(), handle={})
        self._note(ended)

    def _note(self, state: RunState) -> None:
        self._state = state
        if state == self._written:
            return
        try:
            write(self._file, state)
        except OSError as error:
            if not self._is_failing:
                self._complain(
                    f"{self._file} cannot be written: {error.strerror}: other commands see old news"
                )
            self._is_failing = True
        else:
            self._written, self._is_failing = state, False
