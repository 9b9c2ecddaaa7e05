from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.exits import Exit
from launch.local import guard, processes
from launch.local.member import Limits
from launch.local.output import Output
from launch.local.processes import Guard, NoGuard
from launch.local.progress import Lines
from launch.local.run_state import StateWriter
from launch.local.supervise import Site, supervise
from tests.launch.planning import config, model, plan_of
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes


def test_groups_that_are_left() -> None:
    assert guard.watch([b"+1\n", b"+2\n", b"-1\n", b"+3\n", b"-9\n"]) == {2, 3}


def test_groups_that_are_gone_do_no_harm() -> None:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""], start_new_session=True)
    child.wait()
    guard.kill_groups([child.pid])


def sleeper(of: Guard) -> subprocess.Popen[bytes]:
    code = "import time; time.sleep(600)"
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], start_new_session=True, preexec_fn=of.add_self
    )


def test_what_is_not_forgotten_is_killed() -> None:
    with Guard() as ours:
        killed, forgotten = sleeper(ours), sleeper(ours)
        ours.forget(forgotten.pid)
        assert ours.is_alive()
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert forgotten.poll() is None
    forgotten.kill()
    forgotten.wait()


def test_without_a_guard_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(processes.subprocess, "Popen", refuse)
    plan = plan_of(config(model(both={"engine": "sim"})))
    shown = io.StringIO()
    progress = Lines(Output(shown), {})
    writer = StateWriter(tmp_path, "a.yaml", plan.url, plan.admins, progress.say)
    open_before = len(os.listdir("/proc/self/fd"))
    code = asyncio.run(supervise(plan, Site(tmp_path, Limits(), progress, writer), lambda: None))
    assert code == Exit.START_FAILED
    assert shown.getvalue() == (
        "the guard process, which nothing runs without, cannot be started: "
        "[Errno 11] Resource temporarily unavailable\n"
    )
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_no_descriptor_left_for_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", refuse)
    with pytest.raises(NoGuard, match=r"cannot be started: .*Too many open files"), Guard():
        pass


def test_the_terminals_signals_do_not_end_it() -> None:
    script = str(Path(guard.__file__))
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-I", "-S", script], stdin=reading)
    os.close(reading)
    wait_for(lambda: _ignores_signals(process.pid), "the guard's start")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert is_running(process.pid)
    os.close(writing)
    assert process.wait(timeout=60) == 0


def _ignores_signals(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
