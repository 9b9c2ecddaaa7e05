"""The example configs: copied by `baton init --example`, in a checkout and from an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launch.cli import main
from launch.examples import examples
from launch.exits import Exit
from orchestrator.compiled import ROOT

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_an_example_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sorted(examples()) == NAMES
    assert main(["init", "mine.yaml", "--example", "sim"]) == Exit.OK
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "configs/sim.yaml").read_text()
    assert main(["check", "mine.yaml"]) == Exit.OK


def test_one_that_there_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--example", "../sim"]) == Exit.USAGE
    assert capsys.readouterr().err == f"there is no example '../sim'; there is: {', '.join(NAMES)}\n"
    assert not (tmp_path / "baton.yaml").exists()


@pytest.mark.processes
def test_the_wheel_carries_them(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    without_caches = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("orchestrator", "worker", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=without_caches)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(installed)], check=True, timeout=60)
    python = installed / "bin/python"
    (site,) = installed.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # what the package needs
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    environment = os.environ | {"BATON_COMPILE": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*pip, "--no-build-isolation", str(source)], env=environment, check=True, timeout=200)
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "bin/baton"), "init", "mine.yaml", "--example", "gpu-1p1d"]
    subprocess.run(command, env=here, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "configs/gpu-1p1d.yaml").read_text()
