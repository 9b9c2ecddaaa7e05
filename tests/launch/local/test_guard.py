from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import guard
from launch.local.processes import Guard
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
