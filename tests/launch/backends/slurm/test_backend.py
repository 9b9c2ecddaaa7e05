"""Without a cluster: where nothing was submitted nothing is to be ended, nor is Slurm asked for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench.shared.processes import free_port
from launch.backends.base import BackendError
from launch.backends.slurm import backend, queue
from launch.backends.slurm.backend import SlurmBackend
from launch.backends.slurm.queue import SlurmError, Unanswered
from launch.exits import Exit
from launch.local.run_state import FILE, read
from launch.plan import placed_spec
from orchestrator.loop.bounded_calls import BoundedCalls
from tests.launch.planning import config, model

ROOT = Path(__file__).parents[4]
CONFIG = "models: [{name: m, both: {engine: sim}}]\norchestrator: {listen: '127.0.0.1:%d'}\n"
SIM = {"engine": "sim"}
SPECS = [placed_spec("m/prefill/0", "prefill"), placed_spec("m/decode/0", "decode")]
REFUSED = SlurmError("sbatch refuses: invalid partition specified: nosuch")


class Slurm:
    """A stand-in for Slurm's commands; `answers` are what it says to jobs, in order."""

    def __init__(self, answers: Sequence[str | SlurmError]) -> None:
        self._answers = [*answers]
        self.swept: list[str] = []

    def submit(self, script: Path) -> str:
        answer = self._answers.pop(0)
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    def end_all(self, run: str) -> None:
        self.swept.append(run)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Slurm]:
    def make(*answers: str | SlurmError) -> Slurm:
        made = Slurm(answers)
        monkeypatch.setattr(queue, "check_reached", lambda: None)
        monkeypatch.setattr(queue, "submit", made.submit)
        monkeypatch.setattr(backend, "end_all", made.end_all)
        return made

    return make


def made_in(directory: Path) -> SlurmBackend:
    wanted = config(model(prefill=SIM, decode=SIM), launch={"backend": "slurm"})
    return SlurmBackend(wanted, directory, lambda text: None)


async def refused(made: SlurmBackend) -> None:
    """Open it, which fails, and close it."""
    with pytest.raises(BackendError):
        await made.open(SPECS)
    await made.close()


def left_in(directory: Path) -> set[str]:
    return {path.suffix or path.name for path in directory.iterdir()}


def test_slurm_that_cannot_be_reached_is_not_asked_to_end_anything(
    tmp_path: Path, slurm: Callable[..., Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = slurm()

    def refuse() -> None:
        raise Unanswered("squeue has not answered after 30 s")

    monkeypatch.setattr(queue, "check_reached", refuse)
    asyncio.run(refused(made_in(tmp_path)))
    assert made.swept == []
    assert left_in(tmp_path) == set()


def test_after_a_first_job_was_refused_nothing_is_to_be_ended(
    tmp_path: Path, slurm: Callable[..., Slurm]
) -> None:
    made = slurm(REFUSED)
    asyncio.run(refused(made_in(tmp_path)))
    assert made.swept == []
    assert left_in(tmp_path) == {".sbatch"}


@pytest.mark.parametrize(
    "answers", [("7", REFUSED), (Unanswered("sbatch refuses: Socket timed out"),)], ids=["second", "unknown"]
)
def test_what_was_or_may_have_been_submitted_is_ended(
    tmp_path: Path, slurm: Callable[..., Slurm], answers: Sequence[str | SlurmError]
) -> None:
    made = slurm(*answers)
    asyncio.run(refused(made_in(tmp_path)))
    assert made.swept == [tmp_path.name]


def test_a_job_that_is_just_being_submitted_is_ended_too(
    tmp_path: Path, slurm: Callable[..., Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens may be interrupted; the command goes on meanwhile."""
    made = slurm()
    is_asked, may_answer = threading.Event(), threading.Event()
    order: list[str] = []

    def submit(script: Path) -> str:
        is_asked.set()
        may_answer.wait()
        order.append("submitted")
        return "7"

    monkeypatch.setattr(queue, "submit", submit)
    monkeypatch.setattr(backend, "end_all", lambda run: order.append("ended"))

    async def interrupt() -> None:
        opened = made_in(tmp_path)
        opening = asyncio.create_task(opened.open(SPECS))
        await asyncio.to_thread(is_asked.wait)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        closing = asyncio.create_task(opened.close())
        await asyncio.sleep(0)
        may_answer.set()
        await closing

    asyncio.run(interrupt())
    assert order == ["submitted", "ended"]
    assert made.swept == []


def test_nothing_is_submitted_after_the_end(tmp_path: Path, slurm: Callable[..., Slurm]) -> None:
    slurm()  # which has no answer to a job
    opened = made_in(tmp_path)
    asyncio.run(opened.close())
    with pytest.raises(BackendError, match="no job is submitted any more"):
        opened.start(SPECS[0], tmp_path / "log")


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path, slurm: Callable[..., Slurm]) -> None:
    slurm()
    (tmp_path / "members").mkdir()
    asyncio.run(refused(made_in(tmp_path)))
    assert left_in(tmp_path) == {"members"}


def test_a_run_that_was_killed_before_its_first_script_has_no_jobs(
    tmp_path: Path, slurm: Callable[..., Slurm]
) -> None:
    made = slurm()
    opened = made_in(tmp_path)
    SlurmBackend.sweep(opened.handle)
    assert made.swept == []
    (tmp_path / "m-prefill.sbatch").touch()
    SlurmBackend.sweep(opened.handle)
    assert made.swept == [tmp_path.name]


def test_a_folder_that_cannot_be_seen_says_nothing_of_jobs(
    tmp_path: Path, slurm: Callable[..., Slurm]
) -> None:
    made = slurm()
    SlurmBackend.sweep({"run": "run-1", "folder": str(tmp_path / "nowhere")})
    assert made.swept == ["run-1"]


@pytest.mark.processes
def test_a_run_that_slurm_has_never_heard_of_has_ended_and_left_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG % free_port())

    def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    for _ in range(2):
        done = baton("up", "--on", "slurm", "c.yaml")
        assert done.returncode == Exit.START_FAILED
        assert "there is no sbatch here" in done.stderr
        assert "left workers" not in done.stderr
    states = [read(file) for file in tmp_path.glob(f"**/{FILE}")]
    assert len(states) == 2
    assert {(state.ended is None, state.has_left_workers()) for state in states} == {(False, False)}
    assert "was stopped" in baton("ps").stderr


def test_commands_or_a_folder_that_hang_do_not_hold_up_the_end(
    tmp_path: Path, slurm: Callable[..., Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm("7", "8")
    may_go_on, has_ended = threading.Event(), threading.Event()

    def hang(run: str) -> None:
        may_go_on.wait(60)
        has_ended.set()

    monkeypatch.setattr(backend, "end_all", hang)
    monkeypatch.setattr(queue, "queue", list)

    async def open_and_close() -> None:
        opened = made_in(tmp_path)
        await opened.open(SPECS)
        monkeypatch.setattr(opened, "_calls", BoundedCalls("test", 0.2))
        with pytest.raises(BackendError, match=r"or the file system of .* do not answer within"):
            await opened.close()

    asyncio.run(open_and_close())
    assert not has_ended.is_set()
    may_go_on.set()
