"""A command that stands still is begun anew; one that computes or is over soon is not."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import watched
from launch.watched import run_watched
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes

# Stands still the first time, together with what it has started.
STILL_ONCE = """
import os, subprocess, sys, time
with open("started", "a") as file:
    file.write(f"{os.getpid()} ")
if len(open("started").read().split()) == 1:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("child", "w").write(f"{child.pid} ")
    time.sleep(600)
"""
STILL = "import os, time; open('started', 'a').write(f'{os.getpid()} '); time.sleep(600)"


# Goes on until it is told to end.
WAITING = """
import os, time
open("started", "a").write(f"{os.getpid()} ")
while not os.path.exists("end"):
    time.sleep(0.01)
"""


def run(folder: Path, script: str, still_s: float) -> tuple[int, str]:
    with (folder / "log").open("w+b") as log:
        status = run_watched((sys.executable, "-c", script), folder, os.environ, log, still_s)
    return status, (folder / "log").read_text()


def started(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "started").read_text().split()]


def test_its_status_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "print('once'); raise SystemExit(7)", still_s=100) == (7, "once\n")


def test_one_that_stands_still_is_begun_anew(tmp_path: Path) -> None:
    status, log = run(tmp_path, STILL_ONCE, still_s=2)
    assert status == 0
    assert re.fullmatch("nothing was computed for 2 s, ended: python[^,]* S, python[^,]* S\n", log)
    first, _second = started(tmp_path)
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_running(first) and not is_running(child), "the end of what stood still")


def test_one_that_stands_still_each_time_has_failed(tmp_path: Path) -> None:
    status, log = run(tmp_path, STILL, still_s=1)
    assert status < 0
    assert log.count("ended: ") == len(started(tmp_path)) == 2


def test_one_that_computes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at several times, and has computed something each time."""
    ticks = itertools.count()
    looks = []

    def computed(pid: int) -> int:
        looks.append(pid)
        if len(looks) == 5:
            (tmp_path / "end").touch()
        return next(ticks)

    monkeypatch.setattr(watched, "_computed", computed)
    assert run(tmp_path, WAITING, still_s=0.1) == (0, "")
    assert len(started(tmp_path)) == 1
    assert len(looks) >= 5


def test_what_is_computed_is_counted() -> None:
    """That of a child too, also when it has ended."""
    before = watched._computed(os.getpid())
    subprocess.run((sys.executable, "-c", "sum(range(10**7))"), check=True)
    after = watched._computed(os.getpid())
    assert before is not None
    assert after is not None
    assert after > before
