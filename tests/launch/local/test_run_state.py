from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import run_state
from launch.local.run_state import FILE, StateWriter, read, start_of
from tests.launch.runs import entry


def writer(directory: Path, said: list[str] | None = None) -> StateWriter:
    complain = [].append if said is None else said.append
    return StateWriter(directory, "c.yaml", "http://127.0.0.1:1", (), complain)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    writer(tmp_path).note([entry("m/both/0", state="starting")], is_ready=False, operation="a roll")
    state = read(tmp_path / FILE)
    assert state.is_alive()
    assert (state.pid, state.config) == (os.getpid(), os.path.abspath("c.yaml"))
    assert (state.is_ready, state.operation) == (False, "a roll")
    found = state.process("m/both/0")
    assert found is not None
    assert found.state == "starting"
    assert state.process("m/both/1") is None


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        writer(tmp_path).note([], is_ready=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_it_is_replaced_as_a_whole(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.note([], is_ready=False)
    with (tmp_path / FILE).open("rb") as before:
        made.note([entry("m/both/0")] * 100, is_ready=True)
        assert json.loads(before.read())["processes"] == []
    assert len(read(tmp_path / FILE).processes) == 100
    assert os.listdir(tmp_path) == [FILE]


def test_the_end_is_written(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.note([], is_ready=True, operation="a roll")
    made.end([])
    state = read(tmp_path / FILE)
    assert not state.is_alive()
    assert state.ended is not None
    assert state.operation is None
    assert state.is_ready


def test_after_its_end_a_run_has_left_nothing(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.handle = {"run": "run-1"}
    made.note([], is_ready=False)
    assert read(tmp_path / FILE).handle == {"run": "run-1"}
    made.end([])
    state = read(tmp_path / FILE)
    assert (state.handle, state.has_left_workers()) == ({}, False)


def test_a_disk_that_is_full_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = writer(tmp_path, said)
    made.note([], is_ready=False)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_state.msgspec.json, "format", fail)
        made.note([], is_ready=True)
        made.note([], is_ready=True)
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert not read(tmp_path / FILE).is_ready
    made.note([], is_ready=True)
    assert read(tmp_path / FILE).is_ready
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.processes
def test_a_process_is_told_from_a_later_one_with_its_number(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    start = start_of(process.pid)
    assert start is not None
    assert start == start_of(process.pid)
    assert start != start_of(os.getpid())
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_of(process.pid) is None  # a zombie
    process.communicate()
    assert start_of(process.pid) is None
