"""Processes are started as groups that the guard knows, and ended to the last grandchild."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from launch.plan import ProcessSpec

POLL_S = 0.05
KILL_WAIT_S = 5.0  # the kernel's time to carry out SIGKILL
UNKNOWN_CODE: Final = 256  # of an end whose exit code nobody knows: no process can have this one


class NoGuard(OSError):
    """The guard cannot be started, so nothing is; the message says why."""


class Guard:
    """A guard has our end of `guard.py`'s pipe; closed at the end, that kills what is left."""

    _options: Sequence[str] = ()

    def __enter__(self) -> Self:
        """Start it. Raises `NoGuard` if the operating system refuses."""
        try:
            reading, self._writing = os.pipe()  # neither end is inherited across an exec
            try:
                self._process = _started(reading, self._options)
            except OSError:
                os.close(self._writing)
                raise
            finally:
                os.close(reading)
        except OSError as error:
            raise NoGuard(
                f"the guard process, which nothing runs without, cannot be started: {error}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._writing)
        self._process.wait()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def add_self(self) -> None:
        """Add the calling process's group: a forked child calls this before it becomes another program."""
        os.write(self._writing, b"+%d\n" % os.getpid())

    def forget(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writing, b"-%d\n" % group)


class DistantGuard(Guard):
    """A distant guard is no child of ours: whoever kills our children, as Ray does, does not kill it."""

    _options = ("--distant",)

    def is_alive(self) -> bool:
        """Return whether it has been started: nobody hears of its end."""
        return self._process.poll() in (None, 0)


def _started(reading: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Return the guard's process, which reads there."""
    script = Path(__file__).with_name("guard.py")
    return subprocess.Popen(  # noqa: S603  # our own file
        [sys.executable, "-I", "-S", str(script), *options],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class ProcessGroup:
    """A group has a started process as its leader, in a session of its own.

    Whoever starts it must `end()` it. It is what the local backend starts (`launch/backends/base.py`).
    """

    is_kept = False
    starts = 1
    trouble: str | None = None
    is_expiring = False

    def __init__(
        self, spec: ProcessSpec, log: Path, guard: Guard, environ: Mapping[str, str] = os.environ
    ) -> None:
        """Start the leader, which inherits `environ`.

        Raises `OSError` if that is not possible. Output is appended to the file `log`.
        """
        self._guard = guard
        self.ready_url = spec.ready_url
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  # argv comes from the plan, no shell
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environ, **spec.env},
                start_new_session=True,
                preexec_fn=guard.add_self,  # one write, no locks
            )

    @property
    def group(self) -> int:
        return self._process.pid

    @property
    def pid(self) -> int | None:
        """Return the number of the leader, also after its end."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the leader's exit code, negative for a signal; None while it runs. Others may outlive it."""
        return self._process.poll()

    def is_gone(self) -> bool:
        """Return whether no process of the group is left. Its number is free for others from then on."""
        return self._process.poll() is not None and not group_is_alive(self.group)

    def hang_up(self) -> None:
        """Send SIGHUP to the leader alone; nothing happens if it has ended."""
        self._process.send_signal(signal.SIGHUP)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of the group; nothing happens if there is none."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        """Send SIGTERM, and SIGKILL after `limit_s` or as soon as `hurry` is set; this can be repeated.

        What a leader that ended by itself has left behind gets no time. Returns whether the group went
        without SIGKILL.
        """
        if self.exit_code() is None:
            self.signal(signal.SIGTERM)
        else:
            limit_s = 0.0
        is_gone = await self._wait_gone(limit_s, hurry)
        if not is_gone:
            self.signal(signal.SIGKILL)
            await self._wait_gone(KILL_WAIT_S, asyncio.Event())
        self.forget()
        return is_gone

    def forget(self) -> None:
        """Have the guard forget the group, which is gone: it must not kill whoever gets its number next."""
        if self.is_gone():
            self._guard.forget(self.group)

    async def _wait_gone(self, limit_s: float, hurry: asyncio.Event) -> bool:
        deadline = asyncio.get_running_loop().time() + limit_s
        while not self.is_gone():
            if hurry.is_set() or asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True


def group_is_alive(group: int) -> bool:
    """Return whether any process of the group runs.

    Zombies do not count: where nobody reaps orphans, as in many containers, they stay for ever.
    """
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return any(_is_running_in(stat, group) for stat in Path("/proc").glob("[0-9]*/stat"))


def _is_running_in(stat: Path, group: int) -> bool:
    try:
        # PID (COMMAND) STATE PPID PGRP ...; the command may hold spaces and parentheses
        state, _, process_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):  # it ended meanwhile
        return False
    return int(process_group) == group and state not in "ZX"


def describe_exit(code: int) -> str:
    if code == UNKNOWN_CODE:
        return "no known exit code"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
