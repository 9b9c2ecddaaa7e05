"""A member is one process of a run, through all its starts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.local.logs import likely_cause, tail
from launch.local.processes import Guard, ProcessGroup, describe_exit
from launch.local.progress import Progress
from launch.local.run_state import ProcessEntry
from launch.local.upkeep import LEAST_FREE, free_bytes, no_space
from launch.plan import ProcessSpec
from orchestrator.config.printing import masked, one_line

SHOWN_LINES = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Starts and stops have these limits, in seconds."""

    start_s: float = 1800.0  # until everything must be ready
    stop_worker_s: float = 15.0  # from SIGTERM to SIGKILL
    stop_orchestrator_s: float = 35.0  # it drains meanwhile
    first_delay_s: float = 1.0  # before a process that died is started again
    longest_delay_s: float = 30.0
    stable_s: float = 60.0  # after so long a run the next delay is the first again
    log_bytes: int = 0  # a larger log is rotated; 0: none is
    log_files: int = 4  # that are kept of each


class StartFailed(Exception):
    """A process could not be started: the message says for the user which, why, and its last lines."""


class Member:
    """A member is one process of the plan through all its starts: starting, ready, waiting for the next."""

    def __init__(
        self, spec: ProcessSpec, log: Path, limits: Limits, progress: Progress, guard: Guard
    ) -> None:
        self.spec = spec
        self.is_ready = False
        self.state = "waiting"
        self.since = time.time()  # when it came to its state
        self.restarts = 0
        self._log = log
        self._limits = limits
        self._progress = progress
        self._guard = guard
        self._group: ProcessGroup | None = None
        self._started_at = 0.0  # loop time
        self._restart_at: float | None = None  # loop time; None unless it died
        self._delay_s = 0.0

    @property
    def is_running(self) -> bool:
        return self._group is not None and self._restart_at is None

    @property
    def pid(self) -> int | None:
        """Return the number of the process, which leads its group; None if none runs."""
        return self._group.group if self._group is not None and self.is_running else None

    def entry(self) -> ProcessEntry:
        """Return what the state of the run says of the process."""
        return ProcessEntry(
            name=self.spec.name,
            role=self.spec.role,
            state=self.state,
            since=self.since,
            pid=self.pid,
            restarts=self.restarts,
            log=self._log.name,
            url=self.spec.ready_url.removesuffix("/health"),
        )

    def _show(self, state: str) -> None:
        self.state = state
        self.since = time.time()
        self._progress.set(self.spec.name, state)

    def start(self) -> None:
        """Start the process. Raises `StartFailed` if the operating system refuses."""
        try:
            self._group = ProcessGroup(self.spec, self._log, self._guard)
        except OSError as error:
            raise StartFailed(f"{self.spec.name} cannot be started: {error}") from error
        self._started_at = asyncio.get_running_loop().time()
        self._restart_at = None
        self._show("starting")

    def mark_ready(self) -> None:
        self.is_ready = True
        self._show("ready")

    def reload(self) -> None:
        """Have the process reload if it is ready; else it reads the config anyway, or SIGHUP may kill it."""
        if self._group is not None and self.is_ready:
            self._group.hang_up()
            self._progress.say(f"{self.spec.name}: reloads the config; its log tells what came of it")

    def check_started(self) -> None:
        """Raise `StartFailed` if the process has ended."""
        code = self._group.exit_code() if self._group is not None else None
        if code is not None:
            self._show("failed")
            raise StartFailed(_report(self.spec.name, code, self._log))

    def tend(self, now: float) -> None:
        """Notice the end of the process; start it again when its time has come. `now` is loop time."""
        if self._group is None:
            return
        if self._restart_at is None:
            code = self._group.exit_code()
            if code is not None:
                self._note_death(code, now)
        elif now >= self._restart_at and self._group.is_gone():  # its ports are free again
            self._group.forget()
            self._start_again(now)

    def _note_death(self, code: int, now: float) -> None:
        assert self._group is not None  # noqa: S101  # for the type checker
        self._group.signal(signal.SIGKILL)  # what is left of its group is of no use
        self.is_ready = False
        self._delay_s = self._next_delay(now - self._started_at)
        self._restart_at = now + self._delay_s
        self._show("died")
        self._progress.say(
            f"{self.spec.name} ended with {describe_exit(code)} and starts again in {self._delay_s:g} s"
            f" (log: {self._log}){_because(tail(self._log, SHOWN_LINES), code)}"
        )

    def _next_delay(self, ran_s: float) -> float:
        if self._delay_s == 0.0 or ran_s >= self._limits.stable_s:
            return self._limits.first_delay_s
        return min(self._delay_s * 2, self._limits.longest_delay_s)

    def _start_again(self, now: float) -> None:
        try:
            self.start()
            self.restarts += 1
        except StartFailed as error:
            self._delay_s = self._next_delay(0.0)
            self._restart_at = now + self._delay_s
            self._progress.say(f"{error}; tried again in {self._delay_s:g} s")

    async def stop(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Stop the process, if it was started. This can be repeated."""
        if self._group is None:
            return
        self._show("stopping")
        has_obeyed = await self._group.end(limit_s, hurry)
        self._show("stopped" if has_obeyed else "killed")
        self._group = None


def _report(name: str, code: int, log: Path) -> str:
    lines = tail(log, 200)
    shown = [f"  | {one_line(masked(line))}" for line in lines[-SHOWN_LINES:]] or ["  | (no output)"]
    head = f"{one_line(name)} ended while starting, with {describe_exit(code)}. Its last lines ({log}):"
    return "\n".join([head, *shown]) + _because(lines, code, log)


def _because(lines: Sequence[str], code: int, log: Path | None = None) -> str:
    cause = likely_cause(lines, code)
    if cause is None and log is not None and free_bytes(log.parent) < LEAST_FREE:
        cause = no_space(log.parent)
    return f"\nlikely cause: {cause}" if cause else ""
