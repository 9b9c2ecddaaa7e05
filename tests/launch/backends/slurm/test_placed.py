from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest

from launch.backends.slurm import placed
from launch.backends.slurm.backend import is_stale
from launch.backends.slurm.placed import PlacedTask
from launch.backends.slurm.queue import SlurmError, TaskRow
from launch.backends.slurm.report import State, TaskReport
from launch.local.processes import UNKNOWN_CODE
from orchestrator.wire.member import Member

RUNS = TaskRow(
    job="7",
    index=1,
    state="RUNNING",
    reason="None",
    node="n2",
    restarts=0,
    code=0,
    left_s=float("inf"),
    pool="m/decode",
    run="run-1",
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(placed, "time", made)
    return made


@pytest.fixture
def task(clock: Clock) -> PlacedTask:
    return PlacedTask("m/decode/1", "7", Path("/shared/run-1"))


def member(uid: str = "7.1.0.1") -> Member:
    return Member(uid=uid, name="1", model="m", role="decode", url="http://10.0.0.2:20001")


def report(
    state: State = "starting", starts: int = 1, code: int | None = None, of: str = "7.1.0"
) -> TaskReport:
    return TaskReport(incarnation=of, state=state, starts=starts, code=code, node="n2")


def see(task: PlacedTask, clock: Clock, after_s: float = 1.0, **row: object) -> None:
    clock.now += after_s
    task.see(replace(RUNS, **row), clock.now)  # type: ignore[arg-type]


def test_a_worker_is_where_its_task_says(task: PlacedTask, clock: Clock) -> None:
    assert task.ready_url == ""
    see(task, clock)
    task.member = member()
    assert task.ready_url == "http://10.0.0.2:20001/health"
    assert (task.exit_code(), task.trouble, task.is_gone()) == (None, None, False)


def test_what_an_earlier_run_of_the_task_has_left_is_not_believed(task: PlacedTask, clock: Clock) -> None:
    task.member = member("7.1.0.1")
    task.note(report("ended", code=1))
    see(task, clock, restarts=1)
    assert (task.ready_url, task.exit_code()) == ("", None)


def test_a_task_that_waits_for_long_says_why(task: PlacedTask, clock: Clock) -> None:
    see(task, clock, state="PENDING", reason="Resources", node="")
    assert task.trouble is None
    clock.now += placed.WAITS_S + 1
    assert task.trouble == "job 7_1 waits in Slurm's queue: Resources: no node has free what it asks for"
    see(task, clock)
    assert task.trouble is None


def test_a_task_that_lost_its_node_says_so_at_once(task: PlacedTask, clock: Clock) -> None:
    see(task, clock, state="PENDING", reason="BeginTime", node="", restarts=1)
    assert task.trouble == (
        "job 7_1 has lost its node, and waits in Slurm's queue: BeginTime: Slurm starts it again in a while"
    )
    assert task.is_delayed


def test_a_folder_that_is_not_shared_is_named(task: PlacedTask, clock: Clock) -> None:
    see(task, clock)
    assert task.trouble is None
    clock.now += placed.UNSEEN_S + 1
    assert task.trouble is not None
    assert "runs on n2 for 60 s, and has not said anything in /shared/run-1" in task.trouble
    assert "launch.slurm.folder must be a folder that all nodes" in task.trouble
    task.note(report())
    assert task.trouble is None


@pytest.mark.parametrize(
    ("reason", "code", "known"),
    [("JobLaunchFailure", -53, UNKNOWN_CODE), ("NonZeroExitCode", 97, 97)],  # an error of Slurm's own; ours
)
def test_a_node_without_the_folder_is_named(
    task: PlacedTask, clock: Clock, reason: str, code: int, known: int
) -> None:
    see(task, clock, state="FAILED", reason=reason, code=code)
    assert task.exit_code() == known
    assert task.trouble is not None
    assert task.trouble.startswith(
        "job 7_1 has ended, as /shared/run-1 cannot be used on n2: launch.slurm.folder"
    )


def test_an_engine_that_ended_is_told_until_it_is_started_again(task: PlacedTask, clock: Clock) -> None:
    see(task, clock)
    task.note(report())
    task.note(report("ended", code=-9))
    assert (task.exit_code(), task.starts) == (-9, 1)
    task.note(report(starts=2))
    assert (task.exit_code(), task.starts) == (None, 2)


def test_starts_count_on_after_the_node_was_lost(task: PlacedTask, clock: Clock) -> None:
    see(task, clock)
    task.note(report(starts=1))
    task.note(report(starts=3))
    task.note(report(starts=1, of="7.1.1"))
    assert task.starts == 4


def test_a_job_that_ended_by_itself_is_submitted_anew_ever_later(task: PlacedTask, clock: Clock) -> None:
    waits: list[float] = []
    for job in ("8", "9", "10"):
        see(task, clock, state="TIMEOUT", reason="TimeLimit", job=task.job)
        assert task.is_gone()
        begun = clock.now
        while not task.is_due(clock.now):
            clock.now += 0.5
        waits.append(clock.now - begun)
        assert task.trouble == f"job {task.id} has ended, with TIMEOUT (TimeLimit)"
        task.follow(job)
        assert not task.is_gone()
        assert not task.is_due(clock.now)
    assert waits == [2.0, 4.0, 8.0]


def test_a_job_that_slurm_has_forgotten_has_ended(task: PlacedTask, clock: Clock) -> None:
    task.see(None, clock.now)
    assert not task.is_gone()  # it was submitted a moment ago
    see(task, clock)
    task.see(None, clock.now + 1)
    assert task.is_gone()
    assert task.trouble == "job 7_1 has ended, and Slurm knows nothing of it any more"
    assert task.exit_code() == UNKNOWN_CODE


@pytest.mark.parametrize(
    ("state", "code", "known"),
    [
        ("COMPLETED", 0, 0),
        ("FAILED", 1, 1),
        ("CANCELLED", -15, -15),
        *((state, 0, UNKNOWN_CODE) for state in ("CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")),
    ],
)
def test_no_exit_code_is_made_up(task: PlacedTask, clock: Clock, state: str, code: int, known: int) -> None:
    see(task, clock)
    see(task, clock, state=state, code=code)
    assert task.exit_code() == known


def test_an_engine_that_could_not_be_started_has_no_exit_code(task: PlacedTask, clock: Clock) -> None:
    see(task, clock)
    task.note(report("ended", code=None))
    assert task.exit_code() == UNKNOWN_CODE


def test_a_refusal_is_told_while_it_lasts(task: PlacedTask, clock: Clock) -> None:
    see(task, clock, state="FAILED", reason="NonZeroExitCode", code=1)
    task.refuse("sbatch refuses: no such lab", clock.now)
    assert task.trouble == (
        "job 7_1 has ended, with FAILED (NonZeroExitCode), and gets no other place: "
        "sbatch refuses: no such lab"
    )
    assert not task.is_due(clock.now)
    task.follow("8")
    assert task.trouble is None


def test_slurm_is_asked_often_only_while_something_changes(task: PlacedTask, clock: Clock) -> None:
    assert not task.is_settled
    see(task, clock)
    assert not task.is_settled
    task.member = member()
    assert task.is_settled
    see(task, clock, state="PENDING", restarts=1, node="")
    assert not task.is_settled
    clock.now += placed.LONG_S + 1
    assert task.is_settled


@pytest.mark.parametrize(
    ("limit_s", "left_s", "is_so"),
    [
        (math.inf, math.inf, False),
        (7200, 3601, False),
        (7200, 3599, True),
        (600, 301, False),
        (600, 299, True),
    ],
)
def test_a_worker_moves_before_its_time_is_over(
    task: PlacedTask, clock: Clock, limit_s: float, left_s: float, is_so: bool
) -> None:
    task.lead_s = 3600
    see(task, clock, left_s=limit_s)
    see(task, clock, left_s=left_s)
    assert task.is_expiring is is_so


@pytest.mark.parametrize(
    ("uid", "row", "is_so"),
    [
        ("7.1.0.1", RUNS, False),
        ("7.1.0.1", replace(RUNS, state="PENDING", restarts=1), True),
        ("7.1.0.1", replace(RUNS, restarts=1), True),
        ("7.1.1.1", replace(RUNS, state="PENDING", restarts=1), False),  # it has begun since Slurm was asked
        ("7.1.0.3", replace(RUNS, state="FAILED"), True),
        ("7.1.0.1", replace(RUNS, job="8", state="FAILED"), False),
        ("a-pod", RUNS, False),
    ],
)
def test_a_member_is_stale_once_its_task_is_gone(uid: str, row: TaskRow, is_so: bool) -> None:
    assert is_stale(uid, {(row.job, row.index): row}) is is_so


def test_what_slurm_cannot_be_told_does_not_keep_a_run_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def refuse(*what: object) -> None:
        told.append(str(what))
        raise SlurmError("scancel refuses: Unable to contact slurm controller")

    for name in ("cancel_waiting", "signal_task", "kill"):
        monkeypatch.setattr(placed.queue, name, refuse)
    monkeypatch.setattr(placed, "KILL_MARGIN_S", 0.05)
    monkeypatch.setattr(placed, "REPEAT_S", 0.01)
    monkeypatch.setattr(placed, "POLL_S", 0.01)
    task = PlacedTask("m/decode/1", "7", Path("/shared/run-1"))
    assert asyncio.run(task.end(0.05, asyncio.Event())) is False
    assert len(told) > 1
    assert told[-1] == "(['7_1'],)"
