"""Nothing is left of a test run that was killed: this starts one, and kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tests import reaper
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

TESTS = Path(__file__).parent
ON_WORKER = ["-n", "1", "--max-worker-restart", "0"]
# A run, its orchestrator of two processes and their supervisor, two workers, an orphan, and the reaper.
LEAST = 8
START_S = 180.0  # of pytest and an orchestrator, one after the other


class Run:
    """`process` is pytest itself, `tests` is the process that runs the tests: the same one without xdist."""

    def __init__(self, mark: str, process: subprocess.Popen[bytes], tests: int) -> None:
        self.process = process
        self.tests = tests
        self._mark = mark

    def members(self) -> set[int]:
        return reaper.marked(self._mark)


@contextmanager
def killed_if_it_fails(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.kill()
        raise


@contextmanager
def running(directory: Path, *options: str) -> Iterator[Run]:
    """Run `killed_run.py`, in the middle of its test; its whole family has to be gone after the block."""
    mark, started = uuid4().hex, directory / "started"
    argv = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", str(TESTS / "killed_run.py")]
    env = {**os.environ, "BATON_TEST_STARTED": str(started), "BATON_TEST_FAMILY": mark}
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=TESTS.parent, env=env, stdout=output, stderr=output, start_new_session=True
        )
    with process, killed_if_it_fails(process):
        wait_for(lambda: process.poll() is not None or started.exists(), "the middle of its test", START_S)
        assert process.poll() is None, (directory / "output").read_text()
        yield Run(mark, process, int(started.read_text()))
    wait_for(lambda: not reaper.marked(mark), "the end of all processes")


@pytest.mark.parametrize("options", [[], ON_WORKER])
def test_a_run_that_is_killed(options: list[str], tmp_path: Path) -> None:
    with running(tmp_path, *options) as run:
        assert len(run.members()) >= LEAST
        run.process.kill()


def test_a_worker_of_xdist_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, *ON_WORKER) as run:
        assert run.tests != run.process.pid
        os.kill(run.tests, signal.SIGKILL)


@pytest.mark.parametrize("options", [[], ON_WORKER])
def test_ctrl_c(options: list[str], tmp_path: Path) -> None:
    with running(tmp_path, *options) as run:
        os.killpg(run.process.pid, signal.SIGINT)
