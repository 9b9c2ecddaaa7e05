"""A member is one process of a run, through all its starts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launch.backends.base import Backend, BackendError, Started
from launch.local.logs import likely_cause, tail
from launch.local.processes import describe_exit
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
    notice_s: float = 0.0  # until a balancer has noticed that an orchestrator is back
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
        self, spec: ProcessSpec, log: Path, limits: Limits, progress: Progress, backend: Backend
    ) -> None:
        self.spec = spec
        self.is_ready = False
        self.state = "waiting"
        self.since = time.time()  # when it came to its state
        self.restarts = 0
        self._log = log
        self._limits = limits
        self._progress = progress
        self._backend = backend
        self._group: Started | None = None
        self._starts = 1  # of a process that its backend starts again, as far as they were noticed
        self.trouble: str | None = None  # what keeps it from running, as its backend told last
        self._started_at = 0.0  # loop time
        self._restart_at: float | None = None  # loop time; None unless it died
        self._delay_s = 0.0
        self._is_held = False  # an operator's command starts and stops it; its end is no death

    @property
    def is_started(self) -> bool:
        return self._group is not None

    @property
    def is_running(self) -> bool:
        return self._group is not None and self._restart_at is None

    @property
    def is_expiring(self) -> bool:
        """Return whether it runs, in a place that is lost soon."""
        return self._group is not None and self.is_ready and self._group.is_expiring

    @property
    def may_answer(self) -> bool:
        """Return whether it is worth asking whether it is up: it runs, and is somewhere."""
        return self.is_running and self.trouble is None and self.spec.ready_url != ""

    @property
    def pid(self) -> int | None:
        """Return the number of the process, which leads its group; None if none runs here."""
        return self._group.pid if self._group is not None and self.is_running else None

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
            url=self.spec.url,
        )

    def _show(self, state: str) -> None:
        self.state = state
        self.since = time.time()
        self._progress.set(self.spec.name, state)

    def start(self) -> None:
        """Start the process. Raises `StartFailed` if the operating system, or its backend, refuses."""
        try:
            self._group = self._backend.start(self.spec, self._log)
        except (OSError, BackendError) as error:
            raise StartFailed(f"{self.spec.name} cannot be started: {error}") from error
        self._starts, self.trouble = 1, None
        self._started_at = asyncio.get_running_loop().time()
        self._restart_at = None
        self.is_ready = False
        self._show("starting")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Leave it to the caller to start and stop the process, until the block ends."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def start_anew(self) -> None:
        """Start the process after it was stopped. Raises `StartFailed`."""
        self.start()
        self.restarts += 1
        self._delay_s = 0.0

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
        self._follow()
        code = self._group.exit_code() if self._group is not None else None
        if code is not None:
            self._show("failed")
            raise StartFailed(_report(self.spec.name, code, self._log))

    def tend(self, now: float) -> None:
        """Notice the end of the process; start it again when its time has come. `now` is loop time."""
        if self._group is None or self._is_held:
            return
        if self._group.is_kept:
            self._follow()
            self._note_end_of_kept()
        elif self._restart_at is None:
            code = self._group.exit_code()
            if code is not None:
                self._note_death(code, now)
        elif now >= self._restart_at and self._group.is_gone():  # its ports are free again
            self._group.forget()
            self._start_again(now)

    def _follow(self) -> None:
        """Take over what its backend tells: where it is, why it is nowhere, that it was started again."""
        if self._group is None:
            return
        if self._group.ready_url != self.spec.ready_url:
            self.spec = replace(self.spec, ready_url=self._group.ready_url)
            self.is_ready = False
        if self._group.starts > self._starts:
            self.restarts += self._group.starts - self._starts
            self._starts = self._group.starts
            self.is_ready = False
            self._show("starting")
        self._tell_trouble(self._group.trouble)

    def _tell_trouble(self, trouble: str | None) -> None:
        if trouble == self.trouble:
            return
        self.trouble = trouble
        if trouble is not None:
            self.is_ready = False
            self._show("lost" if self._group is not None and self._group.ready_url else "waiting")
            self._progress.say(f"{self.spec.name}: {trouble}")
        elif self.state in ("lost", "waiting"):
            self._show("starting")

    def _note_end_of_kept(self) -> None:
        assert self._group is not None  # noqa: S101  # for the type checker
        code = self._group.exit_code()
        if code is None or self.state == "died":
            return
        self.is_ready = False
        self._show("died")
        self._progress.say(
            f"{self.spec.name} ended with {describe_exit(code)} and is started again"
            f" (log: {self._log}){_because(tail(self._log, SHOWN_LINES), code)}"
        )

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
        self.is_ready = False
        self._restart_at = None


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
