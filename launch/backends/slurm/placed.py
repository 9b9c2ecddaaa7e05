"""A placed task is a worker's place in Slurm as `baton up` sees it, through everything that becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Final

from launch.backends.slurm import queue
from launch.backends.slurm.queue import SlurmError, TaskRow
from launch.backends.slurm.report import NO_FOLDER, TaskReport
from launch.local.processes import UNKNOWN_CODE
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.wire.member import Member

POLL_S: Final = 0.1
REPEAT_S: Final = 3.0  # a signal that came before the task heard any is sent again
WAITS_S: Final = 5.0  # in the queue, until that is worth telling
UNSEEN_S: Final = 60.0  # a task that runs for so long has said where it is, if the folder is shared
HASTEN_S: Final = 10.0  # between two requests to start a task that is delayed
LONG_S: Final = 60.0  # what was so for this long is likely to stay so for a while
UNLISTED_S: Final = 30.0  # after it was submitted a job is in the queue, or was there
KILL_MARGIN_S: Final = 10.0  # a task ends its engine by force itself, and is ended by force so much later
CALL_S: Final = queue.TIMEOUT_S + 5.0  # a command is killed before that, unless its file system is away
FIRST_DELAY_S: Final = 2.0  # before a job that ended by itself is submitted anew
LONGEST_DELAY_S: Final = 120.0
STABLE_S: Final = 300.0  # after so long a run the next delay is the first again

_UNSHARED: Final = "launch.slurm.folder must be a folder that all nodes and this machine have in common"


class PlacedTask:
    """It is one worker's task, and the one that follows it if it ends; see `Started`."""

    is_kept = True
    pid: int | None = None  # it runs on another machine

    def __init__(self, name: str, job: str, folder: Path) -> None:
        self.name = name
        self.pool, _, number = name.rpartition("/")
        self.index = int(number)
        self.starts = 1
        self.member: Member | None = None
        self._folder = folder
        self._calls = BoundedCalls(f"tell {name}", CALL_S)
        self._report: TaskReport | None = None
        self.is_parked = False  # no engine is wanted in its place now
        self._is_ending = False  # somebody waits for that
        self._counted: tuple[str, int] | None = None  # incarnation and start, as far as they were counted
        self._delay_s = 0.0
        self._refusal: str | None = None
        self._hastened_at = -math.inf
        self.lead_s = 0.0  # so long before the end of its time it is to move
        self._most_left_s = 0.0
        self.follow(job)

    def follow(self, job: str) -> None:
        """Be the task of another job from now on."""
        self.job = job
        self._row: TaskRow | None = None
        self._is_listed = False
        self._submitted_at = self._since = time.monotonic()
        self._due_at: float | None = None
        self._refusal = None

    @property
    def id(self) -> str:
        return f"{self.job}_{self.index}"

    # --- what is seen ---------------------------------------------------------------------------

    def see(self, row: TaskRow | None, asked_at: float) -> None:
        """Take over what the queue has of the task; `asked_at`, by `time.monotonic()`, tells when."""
        if row is None and asked_at < self._submitted_at:
            return
        before = self._row
        if row is not None and (
            before is None or (row.state, row.restarts) != (before.state, before.restarts)
        ):
            self._since = asked_at
        if row is not None or self._is_listed or asked_at > self._submitted_at + UNLISTED_S:
            self._row = row
        self._is_listed = self._is_listed or row is not None
        self._most_left_s = max(self._most_left_s, row.left_s) if row is not None else self._most_left_s
        if self.is_gone() and self._due_at is None:
            self._due_at = asked_at + self._next_delay(asked_at)

    def note(self, report: TaskReport | None) -> None:
        """Take over what the task says of its engine."""
        self._report = report
        if report is None or report.state == "parked":
            return
        seen = report.incarnation, report.starts
        if self._counted is not None and seen != self._counted:
            is_same = self._counted[0] == report.incarnation
            self.starts += report.starts - self._counted[1] if is_same else max(1, report.starts)
        self._counted = seen

    @property
    def _current(self) -> TaskReport | None:
        """Return the report, if it is of this run of the task."""
        found = self._report
        if found is None or self._row is None or self._row.has_ended:
            return None
        return found if found.incarnation == self._row.incarnation else None

    @property
    def is_settled(self) -> bool:
        """Return whether nothing is about to change, so that nobody needs to look often."""
        row = self._row
        if row is None or self._is_ending:
            return False
        is_running = row.state == "RUNNING" and (self.member is not None or self.is_parked)
        return is_running or time.monotonic() - self._since > LONG_S

    # --- what is told: see `Started` ------------------------------------------------------------

    @property
    def ready_url(self) -> str:
        member, row = self.member, self._row
        if member is None or row is None or not member.uid.startswith(f"{row.incarnation}."):
            return ""
        return f"{member.url}/health"

    @property
    def trouble(self) -> str | None:
        row = self._row
        if self.is_gone():
            return self._told_ended()
        if row is None:
            return None
        for_s = time.monotonic() - self._since
        if row.is_waiting:
            return self._told_waiting(row) if for_s > WAITS_S or row.restarts else None
        if self._current is None and for_s > UNSEEN_S:
            return (
                f"job {self.id} runs on {row.node} for {UNSEEN_S:g} s, and has not said anything in "
                f"{self._folder}: {_UNSHARED}"
            )
        return None

    def _told_waiting(self, row: TaskRow) -> str:
        lost = "has lost its node, and " if row.restarts else ""
        return f"job {self.id} {lost}waits in Slurm's queue: {row.why}"

    def _told_ended(self) -> str | None:
        if self.is_parked:
            return None
        refused = "" if self._refusal is None else f", and gets no other place: {self._refusal}"
        return f"job {self.id} has ended, {self._how_ended()}{refused}"

    def _how_ended(self) -> str:
        row = self._row
        if row is None:
            return "and Slurm knows nothing of it any more"
        if row.was_not_launched or row.code == NO_FOLDER:
            return f"as {self._folder} cannot be used on {row.node or 'its node'}: {_UNSHARED}"
        return f"with {row.state}" + ("" if row.reason in ("None", "") else f" ({row.reason})")

    def exit_code(self) -> int | None:
        row, report = self._row, self._current
        if self.is_gone():
            return UNKNOWN_CODE if row is None else row.exit_code
        if report is not None and report.state == "ended":
            return UNKNOWN_CODE if report.code is None else report.code
        return None

    def is_gone(self) -> bool:
        row = self._row
        return row.has_ended if row is not None else self._is_listed

    # --- what becomes of it ---------------------------------------------------------------------

    @property
    def is_delayed(self) -> bool:
        """Return whether it has lost its node, and waits for no place but for its time."""
        row = self._row
        is_delayed = row is not None and row.is_waiting and row.restarts > 0 and row.reason == "BeginTime"
        return is_delayed and time.monotonic() - self._hastened_at > HASTEN_S

    def hasten(self) -> None:
        """Have it wait for a place only, not for its time. Raises `SlurmError`."""
        self._hastened_at = time.monotonic()
        queue.start_now(self.id)

    def is_due(self, now: float) -> bool:
        """Return whether it has ended, and is to be submitted anew now."""
        return not self.is_parked and self._due_at is not None and now >= self._due_at

    def refuse(self, why: str, now: float) -> None:
        """Note that it could not be submitted anew: that is tried again later."""
        self._refusal = why
        self._due_at = now + self._next_delay(now)

    def _next_delay(self, now: float) -> float:
        is_first = self._delay_s == 0.0 or now - self._submitted_at > STABLE_S
        self._delay_s = FIRST_DELAY_S if is_first else min(self._delay_s * 2, LONGEST_DELAY_S)
        return self._delay_s

    # Slurm would give a place that is not kept to somebody else's job: a worker that is ended leaves its task
    # behind, which waits to be used again, or to be told that it is not.

    @property
    def is_expiring(self) -> bool:
        """Return whether the time of its job is over soon: if that is short, not before the half of it."""
        row = self._row
        return (
            row is not None
            and row.state == "RUNNING"
            and row.left_s < min(self.lead_s, self._most_left_s / 2)
        )

    @property
    def is_unruly(self) -> bool:
        """Return whether it has an engine though that was ended: Slurm has moved the task meanwhile."""
        report = self._current
        return self.is_parked and not self._is_ending and report is not None and report.state == "starting"

    def resume(self) -> None:
        """Have the engine started in the place that was kept for it."""
        if not self.is_parked:
            return
        self.is_parked = False
        report = self._current
        self.starts, self._counted = 1, None if report is None else (report.incarnation, report.starts + 1)
        queue.signal_task(self.id, "USR2")

    def park(self) -> None:
        """Have the engine ended, and its place kept; a task that has no place yet leaves the queue. Raises
        `SlurmError`.
        """
        self.is_parked = True
        queue.cancel_waiting(self.id)
        queue.signal_task(self.id, "USR1")

    def leave(self) -> None:
        """Have the place given up. Raises `SlurmError`."""
        queue.cancel_waiting(self.id)
        queue.signal_task(self.id, "INT")

    def hang_up(self) -> None:
        """Do nothing: workers do not reload anything."""

    def signal(self, number: signal.Signals) -> None:
        """Do nothing: the task looks after what its engine leaves."""

    def forget(self) -> None:
        """Do nothing: nothing is kept of a task that is gone."""

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        self._is_ending = True
        try:
            if await self._wait_parked(limit_s + KILL_MARGIN_S, hurry):
                return True
            with contextlib.suppress(SlurmError, TimeoutError):  # whoever waits cannot do better
                await self._calls.make(queue.kill, [self.id])
            return False
        finally:
            self._is_ending = False

    async def _wait_parked(self, limit_s: float, hurry: asyncio.Event) -> bool:
        """Have the engine ended; returns whether it was before the limit."""
        begun = time.monotonic()
        told_at = -math.inf
        while not self._has_no_engine():
            now = time.monotonic()
            if hurry.is_set() or now - begun > limit_s:
                return False
            if now - told_at >= REPEAT_S:
                told_at = now
                with contextlib.suppress(SlurmError, TimeoutError):  # told again
                    await self._calls.make(self.park)
            await asyncio.sleep(POLL_S)
        return True

    def _has_no_engine(self) -> bool:
        report = self._current
        return self.is_gone() or (report is not None and report.state == "parked")
