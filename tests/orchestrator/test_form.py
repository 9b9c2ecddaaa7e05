"""An orchestrator says which form it runs; `tests/launch/test_compile.py` has what is done with builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from launch.exits import Exit
from orchestrator.compiled import is_compiled
from orchestrator.config.checks import environment_fault
from orchestrator.form import FORM_ENV, builds_folder
from tests.orchestrator.running import Orchestrator, simulated, starting

FORM = "compiled" if is_compiled() else "pure"
LINE = {"compiled": "the compiled form (built in ", "pure": "pure Python (BATON_FORM=pure) runs"}


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_a_running_orchestrator_says_its_form(tmp_path: Path, processes: int) -> None:
    """In its log, its metrics, and of each process that serves."""
    with simulated("prefill", "decode") as workers, starting(tmp_path, workers) as start:
        orchestrator = start(processes=processes)
        answers = [health(orchestrator) for _ in range(20)]
        assert {answer["form"] for answer in answers} == {FORM}
        assert f'form="{FORM}"' in orchestrator.admin("/metrics").text
        assert LINE[FORM] in orchestrator.lines


def health(orchestrator: Orchestrator) -> dict[str, str]:
    found: dict[str, str] = httpx.get(f"{orchestrator.url}/health?verbose", trust_env=False).json()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("command", ["orchestrator", "--version"])
def test_without_a_build_the_compiled_form_is_refused(tmp_path: Path, command: str) -> None:
    config = tmp_path / "config.yaml"
    model = {"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}
    config.write_text(json.dumps({"orchestrator": {"listen": "127.0.0.1:0"}, "models": [model]}))
    done = subprocess.run(
        (sys.executable, "-m", "launch.cli", command, str(config)),
        env={**os.environ, FORM_ENV: "compiled", "BATON_BUILDS": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == Exit.USAGE
    assert done.stderr == (
        "BATON_FORM=compiled, but no build of these sources is there: `make compile` builds it\n"
    )


def test_a_form_that_nobody_knows_is_named() -> None:
    fault = environment_fault({FORM_ENV: "fast"})
    assert fault == (FORM_ENV, "must be one of auto, pure, compiled, not 'fast'")
    assert environment_fault({FORM_ENV: ""}) is environment_fault({}) is None


def test_builds_are_kept_with_the_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "prefix", "/project/.venv")
    assert builds_folder({}) == Path("/project/.venv/baton-builds")
    assert builds_folder({"BATON_BUILDS": "/there"}) == Path("/there")
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert builds_folder({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/baton/builds")
    assert builds_folder({}) == Path.home() / ".cache/baton/builds"
