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
from orchestrator.config.file import load_config

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_an_example_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sorted(examples()) == NAMES
    assert main(["init", "mine.yaml", "--example", "sim"]) == Exit.OK
    original = (ROOT / "configs/sim.yaml").read_text()
    assert (tmp_path / "mine.yaml").read_text() == original.replace("configs/sim.yaml", "mine.yaml")
    assert main(["check", "mine.yaml"]) == Exit.OK


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_right_wherever_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.yaml", "--example", name]) == Exit.OK
    assert capsys.readouterr().out.count("\n") == 1
    text = (tmp_path / "mine.yaml").read_text()
    assert "mine.yaml" in text
    assert f"configs/{name}.yaml" not in text
    assert main(["check", "mine.yaml"]) == Exit.OK, capsys.readouterr().err


def test_a_checkout_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "a: b #c"
    (checkout / "configs/models/tiny-chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.init.CHECKOUT", checkout)
    assert main(["init", "--example", "quickstart"]) == Exit.OK
    (model,) = load_config("baton.yaml").models
    assert model.path == str(checkout / "configs/models/tiny-chat")


def test_without_a_checkout_it_is_said_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.init.CHECKOUT", tmp_path)
    assert main(["init", "--example", "quickstart"]) == Exit.OK
    assert capsys.readouterr().out.splitlines()[1:] == [
        "before that, change `path: configs/models/tiny-chat`: it is in a checkout of Baton; "
        "name a model that you have"
    ]


@pytest.mark.parametrize("engine", ["sim", "vllm"])
def test_an_example_has_its_engines(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["init", "--example", "sim", "--engine", engine])
    assert ended.value.code == Exit.USAGE
    assert "argument --engine: not allowed with argument --example" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
    original = (ROOT / "configs/gpu-1p1d.yaml").read_text()
    assert (tmp_path / "mine.yaml").read_text() == original.replace("configs/gpu-1p1d.yaml", "mine.yaml")
