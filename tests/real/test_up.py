"""`baton up` with real engines, whose cores do not watch their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.shared.processes import tree
from tests.baton import START_S
from tests.real.conftest import Stage, config_text, free_base
from tests.waiting import wait_for, wait_until_gone


@pytest.fixture(autouse=True)
def empty_stage(stage: Stage) -> None:
    """These tests start engines of their own."""
    stage.clear()


def up(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    config = folder / "cluster.yaml"
    config.write_text(config_text(free_base()))
    settings = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "up", str(config), *settings],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigkill_of_up_leaves_no_engine_core(tmp_path: Path) -> None:
    with up(tmp_path) as process:
        try:
            members = wait_for_engine_cores(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
    wait_until_gone(members)


def wait_for_engine_cores(pid: int) -> set[int]:
    """A process and all below it, once both workers have started their engine cores."""

    def family() -> set[int]:
        members = set(tree(pid))
        return members if sum("EngineCore" in title(member) for member in members) == 2 else set()

    return wait_for(family, "the engine cores", START_S)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_an_engine_that_refuses_its_arguments_is_shown(tmp_path: Path) -> None:
    with up(tmp_path, "models.0.decode.args=[--no-such-flag]") as process:
        out, err = process.communicate(timeout=START_S)
    assert process.returncode == 3
    assert "ready:" not in out
    assert "tiny-chat/decode/0" in err
    assert "--no-such-flag" in err  # its last lines
