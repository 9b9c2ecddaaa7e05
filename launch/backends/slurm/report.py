"""A task says in a file what its engine does, for `baton up`, which Slurm tells of the task only.

The file is beside those of the members, which tell the orchestrator where to send requests, and is replaced
as a whole in the same way.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from launch.local.upkeep import WORKERS_FILE
from orchestrator.wire.info import Role
from orchestrator.wire.member import MAX_FILE_BYTES, Member, file_name
from orchestrator.wire.regular import read_regular

CONFIG: Final = WORKERS_FILE  # the config of the run, as the tasks read it
MEMBERS: Final = "members"
TASKS: Final = "tasks"
_MAX_BYTES: Final = 64 * 1024

# Exit codes of a task that has not started any engine.
NO_FOLDER: Final = 97
NO_PLAN: Final = 98

State = Literal["starting", "ended", "parked", "stopping"]


class TaskReport(msgspec.Struct, frozen=True, kw_only=True):
    """A report says how it stands with the engine of a task."""

    incarnation: str  # JOB.INDEX.RESTARTS: of which run of the task this is
    state: State  # `ended`: started again in a moment; `parked`: not before it is asked for
    starts: int  # of the engine in this run of the task
    code: int | None  # what it ended with last, negative for a signal
    node: str
    problem: str | None = None  # why it could not be started


def age_of(uid: str) -> tuple[int, int, int]:
    """Return what orders the starts of a worker, by the `uid` of its members: JOB.INDEX.RESTARTS.START.

    One that is not of a task comes before all others.
    """
    parts = uid.split(".")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        return 0, 0, 0
    return int(parts[0]), int(parts[2]), int(parts[3])


def uid_of(folder: Path, member: Member) -> str:
    """Return whose start the file of a worker's member is; an empty text if there is none, or garbage."""
    try:
        path = folder / file_name(member.model, member.role, member.name)
        content = read_regular(path, MAX_FILE_BYTES)
        return msgspec.json.decode(content, type=Member).uid
    except (OSError, ValueError):
        return ""


def write_report(folder: Path, model: str, role: Role, name: str, report: TaskReport) -> None:
    """Write the report of a worker's task. Raises `OSError`."""
    reports = folder / TASKS
    reports.mkdir(parents=True, exist_ok=True)
    path = reports / file_name(model, role, name)
    draft = reports / f".{os.getpid()}.{os.urandom(4).hex()}.draft"
    try:
        draft.write_bytes(msgspec.json.encode(report) + b"\n")
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read_report(folder: Path, model: str, role: Role, name: str) -> TaskReport | None:
    """Return the report of a worker's task; None if there is none, or none that can be understood."""
    try:
        content = read_regular(folder / TASKS / file_name(model, role, name), _MAX_BYTES)
        return msgspec.json.decode(content, type=TaskReport)
    except (OSError, ValueError):
        return None
