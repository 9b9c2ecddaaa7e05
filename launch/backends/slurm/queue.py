"""Slurm is asked and told by its own commands: sbatch, squeue, scancel and scontrol."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launch.backends.slurm.script import run_of
from launch.local.processes import UNKNOWN_CODE
from orchestrator.config.slurm import seconds_of

# Slurm's commands try a controller that is away for 9 s, and a configuration that is not there for a minute.
TIMEOUT_S: Final = 30.0
_FIELDS: Final = (
    "ArrayJobID",
    "ArrayTaskID",
    "State",
    "Reason",
    "NodeList",
    "RestartCnt",
    "exit_code",
    "TimeLeft",
    "Name",  # the last one, as there may be anything in it
)
_BETWEEN: Final = "|"

_ENDED: Final = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
_WAITS: Final = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "RESIZING")
)

# What keeps a job in the queue, in words. Others are named as Slurm does.
_REASONS: Final = {
    "Resources": "no node has free what it asks for",
    "Priority": "other jobs come first",
    "BeginTime": "Slurm starts it again in a while",
    "JobHeldUser": "it is held: `scontrol release {job}` lets it go on",
    "JobHeldAdmin": "it is held by an administrator",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionTimeLimit": "it asks for more time than the partition gives: lower launch.slurm.time",
    "PartitionNodeLimit": "no node of the partition has what it asks for",
    "BadConstraints": "no node can have what it asks for: see launch.slurm.sbatch",
    "ReqNodeNotAvail": "the nodes that it asks for are down, or reserved",
    "Licenses": "it waits for a licence",
    "launch_failed_requeued_held": "it could not be started on its node, and is held: "
    "`scontrol release {job}` has it tried again",
}


class SlurmError(Exception):
    """Slurm is not there, does not answer, or refuses something; the message is for the user."""


class Unanswered(SlurmError):
    """Slurm was asked for something, and nobody knows whether it has done it."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A row is one task of a job array as the queue has it."""

    job: str  # the number of the array
    index: int  # which worker of the pool
    state: str  # PENDING, RUNNING, ...
    reason: str  # why it waits, or has failed
    node: str  # where it runs, or ran
    restarts: int  # how often Slurm has put it back into the queue
    code: int  # what Slurm has for its exit code, or a signal's number below zero; see `exit_code`
    left_s: float  # of its time; infinite if it has no limit
    pool: str
    run: str

    @property
    def id(self) -> str:
        return f"{self.job}_{self.index}"

    @property
    def incarnation(self) -> str:
        """Return what tells this run of the task from those before Slurm put it back into the queue."""
        return f"{self.job}.{self.index}.{self.restarts}"

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def exit_code(self) -> int:
        """Return what it ended with: Slurm has a 0, or an error of its own, also where no process ended."""
        is_known = self.state == "COMPLETED" or self.code != 0
        return self.code if is_known and not self.was_not_launched else UNKNOWN_CODE

    @property
    def was_not_launched(self) -> bool:
        return self.reason == "JobLaunchFailure"

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITS

    @property
    def why(self) -> str:
        """Return for the user what keeps the task in the queue."""
        said = _REASONS.get(self.reason)
        return self.reason if said is None else f"{self.reason}: {said.format(job=self.id)}"


def check_reached() -> None:
    """Return if Slurm answers, and can be given jobs from here. Raises `SlurmError`."""
    if shutil.which("sbatch") is None:
        raise SlurmError(_missing("sbatch"))
    queue()


def submit(script: Path) -> str:
    """Submit a script, and return the number of its job.

    Raises `SlurmError`: there is no such job, unless it is `Unanswered`.
    """
    answer = _ask("sbatch", "--parsable", str(script)).strip()
    return answer.partition(";")[0]  # with the name of the cluster after it where there are several


def queue() -> list[TaskRow]:
    """Return the tasks of all of this user's runs, with those that ended of late. Raises `SlurmError`."""
    wanted = ",".join(f"{name}:{_BETWEEN}" for name in _FIELDS)
    text = _ask("squeue", "--me", "--noheader", "--array", "--states=all", f"--Format={wanted}")
    return [*parse_queue(text)]


def parse_queue(text: str) -> Iterator[TaskRow]:
    """Yield the rows of ours in what squeue writes; others are left out."""
    for line in text.splitlines():
        parts = line.split(_BETWEEN, len(_FIELDS) - 1)
        if len(parts) == len(_FIELDS):
            yield from _row(dict(zip(_FIELDS, parts, strict=True)))


def _row(fields: Mapping[str, str]) -> Iterator[TaskRow]:
    known = run_of(fields["Name"].removesuffix(_BETWEEN))
    if known is None or not fields["ArrayTaskID"].isdigit():
        return
    yield TaskRow(
        job=fields["ArrayJobID"],
        index=int(fields["ArrayTaskID"]),
        state=fields["State"],
        reason=fields["Reason"],
        node=fields["NodeList"],
        restarts=_number(fields["RestartCnt"]),
        code=_code(_number(fields["exit_code"])),
        left_s=_left(fields["TimeLeft"]),
        pool=known[0],
        run=known[1],
    )


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _left(text: str) -> float:
    """Return how much time a task has, which may be `NOT_SET` or `INVALID`."""
    try:
        return seconds_of(text)
    except ValueError:
        return math.inf


def _code(status: int) -> int:
    try:
        return os.waitstatus_to_exitcode(status)
    except ValueError:  # nothing that a process can end with
        return UNKNOWN_CODE


# --- what is told ---------------------------------------------------------------------------------


def cancel_waiting(task: str) -> None:
    """Take a task out of the queue, unless it runs. Raises `SlurmError`."""
    _tell("scancel", "--state=PENDING", task)


def signal_task(task: str, signal: str) -> None:
    """Send a signal, such as TERM, to what a task has become, and to nothing that this has started.

    Nothing happens if it does not run. Raises `SlurmError`.
    """
    _tell("scancel", "--batch", f"--signal={signal}", task)


def kill(tasks: Sequence[str]) -> None:
    """End tasks, or whole jobs, whatever they do. Raises `SlurmError`."""
    if tasks:
        _tell("scancel", *tasks)
        _tell("scancel", "--full", "--signal=KILL", *tasks)


def start_now(task: str) -> None:
    """Have a task that was put back into the queue wait for a place only, not for its time. Raises
    `SlurmError`.
    """
    _ask("scontrol", "update", f"JobId={task}", "StartTime=now")


def _tell(*command: str) -> None:
    """Have a command done; it may be about tasks that have ended meanwhile. Raises `SlurmError`."""
    try:
        _ask(*command)
    except SlurmError as error:
        is_silent = str(error).endswith(_REFUSES)  # as if none of the tasks is in the state that is meant
        if not is_silent and not any(text in str(error) for text in _TOO_LATE):
            raise


_REFUSES: Final = "refuses"

# What scancel says of tasks that do not run, or not any more.
_TOO_LATE: Final = ("Invalid job id", "already completing or completed", "Job/step already")


def _ask(*command: str) -> str:
    """Return what a command of Slurm's writes. Raises `SlurmError`."""
    try:
        done = subprocess.run(  # noqa: S603  # no shell, and names that are ours
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environ_of(os.environ),
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(_missing(command[0])) from None
    except subprocess.TimeoutExpired as error:
        raise Unanswered(
            f"{command[0]} has not answered after {TIMEOUT_S:g} s{_said(error.stderr)}"
        ) from error
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    if done.returncode != 0:
        said = _said(done.stderr or done.stdout)
        kind = Unanswered if any(text in said for text in _LOST) else SlurmError
        raise kind(f"{command[0]} {_REFUSES}{said}")
    return done.stdout


# What Slurm's commands say if an answer was lost on its way.
_LOST: Final = ("timed out", "Zero Bytes were", "receive failure", "shutdown failure")


def _missing(command: str) -> str:
    return f"there is no {command} here: run this where Slurm's commands are, such as a login node"


def environ_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for Slurm's commands: without the user's own defaults for squeue and scancel,
    and without what Slurm has set for a job that `baton up` runs in, as our jobs would take it for theirs.
    """
    ours = ("SQUEUE_", "SCANCEL_", "SLURM_") if "SLURM_JOB_ID" in environ else ("SQUEUE_", "SCANCEL_")
    kept = {name: value for name, value in environ.items() if not name.startswith(ours)}
    return kept | {name: environ[name] for name in _WHERE if name in environ}


# Where Slurm is.
_WHERE: Final = ("SLURM_CONF", "SLURM_CLUSTERS")


def _said(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    lines = [
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()
    ]
    return f": {' / '.join(lines[:5])}" if lines else ""
