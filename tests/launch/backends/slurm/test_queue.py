from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launch.backends.slurm import queue
from launch.backends.slurm.queue import SlurmError, TaskRow, Unanswered, parse_queue

LISTED = """\
3|1|PENDING|BeginTime||1|0|0:00|baton m/prefill run-7|
10|0|RUNNING|None|n2|0|0|6-23:00:10|baton a b/c|d/decode run-1|
9|N/A|CANCELLED|PartitionConfig||0|0|INVALID|baton m/decode run-1|
5|0|FAILED|JobLaunchFailure|n3|0|4021|1:00|baton m/decode run-1|
8|2|FAILED|NonZeroExitCode|n3|0|24832|1:00|baton m/decode run-1|
6|0|RUNNING|None|n3|0|0|UNLIMITED|somebody's training|
6|0|RUNNING
"""


def test_the_queue_has_our_tasks_among_others() -> None:
    waits, runs, unlaunched, failed = parse_queue(LISTED)
    assert waits == TaskRow(
        job="3",
        index=1,
        state="PENDING",
        reason="BeginTime",
        node="",
        restarts=1,
        code=0,
        left_s=0.0,
        pool="m/prefill",
        run="run-7",
    )
    assert (waits.is_waiting, waits.has_ended, waits.id, waits.incarnation) == (True, False, "3_1", "3.1.1")
    assert (runs.pool, runs.run, runs.node) == ("a b/c|d/decode", "run-1", "n2")
    assert (runs.is_waiting, runs.has_ended) == (False, False)
    assert runs.left_s == 6 * 86400 + 23 * 3600 + 10
    assert (unlaunched.has_ended, unlaunched.reason) == (True, "JobLaunchFailure")
    assert failed.code == 97


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("Resources", "Resources: no node has free what it asks for"),
        ("JobHeldUser", "JobHeldUser: it is held: `scontrol release 3_1` lets it go on"),
        ("AssocGrpGRES", "AssocGrpGRES"),
    ],
)
def test_what_keeps_a_task_waiting_is_said_in_words(reason: str, told: str) -> None:
    (row,) = parse_queue(f"3|1|PENDING|{reason}||1|0|0:00|baton m/prefill run-7|")
    assert row.why == told


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Only what is in this folder is found as a command."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def write_command(place: Path, name: str, text: str) -> None:
    path = place / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_machine_without_slurm_is_told(commands: Path) -> None:
    with pytest.raises(SlurmError, match="there is no sbatch here: run this where Slurm's commands are"):
        queue.submit(commands / "x.sbatch")


def test_commands_do_not_take_over_a_job_that_they_run_in() -> None:
    mine = {"PATH": "/bin", "SLURM_CONF": "/etc/s", "SQUEUE_PARTITION": "x", "SBATCH_ACCOUNT": "lab"}
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/s", "SBATCH_ACCOUNT": "lab"}
    assert queue.environ_of(mine) == kept
    assert queue.environ_of(mine | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == kept


@pytest.mark.processes
def test_the_words_of_slurm_are_the_users(commands: Path) -> None:
    said = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: No such"
    )
    write_command(commands, "sbatch", f"echo '{said}' >&2; exit 1")
    with pytest.raises(SlurmError) as refused:
        queue.submit(commands / "x.sbatch")
    assert str(refused.value) == (
        "sbatch refuses: invalid partition specified: x / Batch job submission failed: No such"
    )


@pytest.mark.processes
def test_whether_a_job_was_submitted_is_not_known_if_the_answer_was_lost(commands: Path) -> None:
    write_command(commands, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid account") as caught:
        queue.submit(commands / "x.sbatch")
    assert not isinstance(caught.value, Unanswered)
    write_command(commands, "sbatch", "echo 'sbatch: error: Socket timed out on send/recv' >&2; exit 1")
    with pytest.raises(Unanswered, match="Socket timed out"):
        queue.submit(commands / "x.sbatch")


@pytest.mark.processes
def test_a_cluster_is_reached_only_with_all_commands_and_an_answer(commands: Path) -> None:
    write_command(commands, "squeue", "exit 0")
    with pytest.raises(SlurmError, match="there is no sbatch here"):
        queue.check_reached()
    write_command(commands, "sbatch", "exit 0")
    queue.check_reached()
    write_command(commands, "squeue", "echo 'Could not establish a configuration source' >&2; exit 1")
    with pytest.raises(SlurmError, match="squeue refuses: Could not establish"):
        queue.check_reached()


@pytest.mark.processes
def test_a_job_is_known_by_its_number(commands: Path) -> None:
    write_command(commands, "sbatch", "echo '123;cluster'")
    assert queue.submit(commands / "x.sbatch") == "123"


@pytest.mark.processes
def test_slurm_may_not_answer(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TIMEOUT_S", 0.2)
    write_command(commands, "squeue", "echo 'slurm_load_jobs error' >&2; exec /bin/sleep 60")
    with pytest.raises(SlurmError, match=r"squeue has not answered after 0\.2 s"):
        queue.queue()


@pytest.mark.processes
def test_a_task_that_has_just_ended_can_be_told_something(commands: Path) -> None:
    write_command(
        commands,
        "scancel",
        "echo 'scancel: error: Kill job error on job id 1_0: Invalid job id specified' >&2; exit 1",
    )
    queue.signal_task("1_0", "INT")
    write_command(commands, "scancel", "exit 1")  # none of the tasks is in that state
    queue.cancel_waiting("1")
    write_command(commands, "scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(SlurmError, match="permission denied"):
        queue.signal_task("1_0", "INT")
