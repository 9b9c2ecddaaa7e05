"""Clients have environments of their own: what they need has no place among the project's dependencies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from bench.shared.processes import ROOT, Failed, last_line

HERE = Path(__file__).parent
FOLDER = ROOT / ".venv-clients"
NODE = FOLDER / "node"
_INSTALL_S = 1800.0
_TORCH = "https://download.pytorch.org/whl/cpu"  # PyTorch's own: its CPU builds may be nowhere else
_CONSTRAINTS = ROOT / "requirements/constraints.txt"


@cache
def pins() -> dict[str, list[str]]:
    """Return what each environment for Python gets."""
    document = tomllib.loads((HERE / "environments.toml").read_text())
    return {
        name: [f"{package}=={version}" for package, version in of.items()] for name, of in document.items()
    }


@cache
def python_of(name: str) -> str:
    """Return the interpreter of an environment, which is made if it is not there as it should be; that of
    the project for "". Raises `Failed` with the reason if it cannot be made.
    """
    if not name:
        return sys.executable
    folder, wanted = FOLDER / name, "\n".join(pins()[name])
    python, stamp = folder / "bin/python", folder / "setup-done"
    if not stamp.exists() or stamp.read_text() != wanted:
        _say(name)
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        for packages in _in_turn(pins()[name]):
            _install(python, packages)
        stamp.write_text(wanted)
    return str(python)


def _in_turn(packages: list[str]) -> list[list[str]]:
    """PyTorch comes first, as it would be the build for GPUs otherwise, of many gigabytes."""
    if not any(package.startswith("guidellm==") for package in packages):
        return [packages]
    lines = _CONSTRAINTS.read_text().splitlines()
    return [[next(line for line in lines if line.startswith("torch=="))], packages]


def _install(python: Path, packages: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    if not packages[0].startswith("torch=="):
        return _run([*pip, *packages])
    try:
        return _run([*pip, "--no-deps", *packages])
    except Failed:
        return _run([*pip, "--no-deps", "--index-url", _TORCH, *packages])


@cache
def node_folder() -> Path:
    """Return the folder whose modules Node finds, which is made if it is not there as it should be."""
    locked, stamp = (HERE / "node/package-lock.json").read_text(), NODE / "setup-done"
    if not stamp.exists() or stamp.read_text() != locked:
        _say("node")
        shutil.rmtree(NODE, ignore_errors=True)
        NODE.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "node" / name, NODE)
        _run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], NODE)
        stamp.write_text(locked)
    return NODE


def version_of(environment: str, package: str) -> str:
    """Return the version of a package that is installed there."""
    if environment == "node":
        return str(json.loads((NODE / "node_modules" / package / "package.json").read_text())["version"])
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _run_out([python_of(environment), "-c", ask]).strip()


def _say(name: str) -> None:
    print(f"clients: installing {name}", file=sys.stderr, flush=True)


def _run(command: list[str], folder: Path | None = None) -> None:
    _run_out(command, folder)


def _run_out(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_S, check=False
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} took over {_INSTALL_S:g} s") from error
    if done.returncode:
        raise Failed(last_line(done.stderr or done.stdout))
    return done.stdout
