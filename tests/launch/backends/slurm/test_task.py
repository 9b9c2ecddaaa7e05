"""What runs on a node, as Slurm would start it there, with the simulated engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from bench.shared.processes import tree
from launch.backends.slurm.report import CONFIG, MEMBERS, NO_FOLDER, NO_PLAN, read_report
from orchestrator.compiled import ROOT
from orchestrator.wire.member import Member, read_members, write_member
from tests.launch.planning import config
from tests.waiting import running_with, wait_for, wait_until_gone

pytestmark = pytest.mark.processes

SLURM = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURMD_NODENAME": "n2"}


class Task:
    """A task in a folder that it shares with the test."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        self.members = folder / MEMBERS
        self.process = process

    def member(self) -> Member | None:
        found = read_members(self.members).members
        return found[0] if found else None

    def up(self, other_than: Member | None = None) -> Member:
        """Wait until a start, another one than before, answers; return it."""

        def answering() -> Member | None:
            found = self.member()
            is_other = other_than is None or (found is not None and found.uid != other_than.uid)
            return found if found is not None and is_other and answers(found) else None

        return wait_for(answering, "an engine that answers")

    def state(self) -> str | None:
        report = read_report(self.folder, "m", "decode", "3")
        return None if report is None else report.state

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Return the exit code, once nothing is left."""
        pids = tree(self.process.pid)
        code = self.process.wait(timeout=60)
        wait_until_gone(pids)
        return code


def answers(member: Member) -> bool:
    try:
        return httpx.get(f"{member.url}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


def kill_engine(member: Member) -> None:
    for pid in running_with(f"--port\0{member.url.rpartition(':')[2]}\0"):
        os.kill(pid, signal.SIGKILL)


def started(folder: Path, **environ: str) -> subprocess.Popen[str]:
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            (sys.executable, "-m", "launch.backends.slurm.task", str(folder), "m/decode"),
            env={**os.environ, "PYTHONPATH": str(ROOT), **SLURM, **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def running(folder: Path, **environ: str) -> Iterator[Task]:
    pool = {"engine": "sim", "sim": {"decode_ms_per_token": 20}, "zone": "rack-1"}
    made = config({"name": "m", "prefill": {"engine": "sim"}, "decode": pool})
    (folder / CONFIG).write_text(made.model_dump_json(exclude_unset=True))
    (folder / MEMBERS).mkdir()
    task = Task(folder, started(folder, **environ))
    try:
        yield task
    finally:
        task.send(signal.SIGINT)
        task.end()


def test_a_task_tells_where_its_worker_is(tmp_path: Path) -> None:
    with running(tmp_path, SLURM_RESTART_COUNT="2") as task:
        member = task.up()
        assert (member.uid, member.name, member.model, member.role) == ("7.3.2.1", "3", "m", "decode")
        assert (member.zone, member.is_draining) == ("rack-1", False)
        report = read_report(tmp_path, "m", "decode", "3")
        assert report is not None
        assert (report.incarnation, report.state, report.node) == ("7.3.2", "starting", "n2")
    assert task.process.returncode == 0
    assert task.member() is None


def test_an_engine_that_ended_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        first = task.up()
        kill_engine(first)
        second = task.up(other_than=first)
        assert (first.uid, second.uid) == ("7.3.0.1", "7.3.0.2")
        assert first.url != second.url
    assert "the engine ended with signal SIGKILL" in (tmp_path / "log").read_text()


def test_a_place_is_kept_for_the_next_engine(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        first = task.up()
        task.send(signal.SIGUSR1)
        wait_for(lambda: task.state() == "parked", "the engine to end")
        assert (task.member(), answers(first), task.process.poll()) == (None, False, None)
        task.send(signal.SIGUSR2)
        assert task.up().uid == "7.3.0.2"


@contextmanager
def streamed(member: Member, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    body = {"model": "m", "prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    url = f"{member.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_requests_come_to_their_end_before_the_engine_does(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        member = task.up()
        with streamed(member, tokens=100) as lines:
            task.send(signal.SIGTERM)
            draining = wait_for(lambda: is_draining(task), "the member to be draining")
            assert draining
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert task.end() == 0
        assert task.member() is None
    assert "the worker is free, and ends" in (tmp_path / "log").read_text()


def is_draining(task: Task) -> bool:
    found = task.member()
    return found is not None and found.is_draining


def test_a_second_signal_ends_the_engine_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        member = task.up()
        with streamed(member, tokens=100_000):
            task.send(signal.SIGTERM)
            wait_for(lambda: is_draining(task), "the member to be draining")
            task.send(signal.SIGINT)
            assert task.end() == 0


def test_a_members_file_that_is_gone_is_written_again(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        member = task.up()
        for garbage in (None, "garbage"):
            (file,) = task.members.iterdir()
            file.unlink() if garbage is None else file.write_text(garbage)
            wait_for(lambda: task.member() == member, "the file")


def test_a_worker_that_is_elsewhere_by_now_ends(tmp_path: Path) -> None:
    with running(tmp_path) as task:
        newer = msgspec.structs.replace(task.up(), uid="7.3.1.1", url="http://10.0.0.9:20000")
        write_member(task.members, newer)
        assert task.end() == 0
        assert task.member() == newer
    assert "the worker is elsewhere now, as 7.3.1.1: this one ends" in (tmp_path / "log").read_text()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert process.wait(timeout=60) == NO_FOLDER
    assert f"cannot read {tmp_path}/config.json: No such file or directory" in (tmp_path / "log").read_text()


def test_a_network_that_the_node_is_not_in_is_named(tmp_path: Path) -> None:
    made = config(
        {"name": "m", "prefill": {"engine": "sim"}, "decode": {"engine": "sim"}},
        launch={"slurm": {"network": "203.0.113.0/24"}},
    )
    (tmp_path / CONFIG).write_text(made.model_dump_json(exclude_unset=True))
    assert started(tmp_path).wait(timeout=60) == NO_PLAN
    assert "has no address in 203.0.113.0/24" in (tmp_path / "log").read_text()
