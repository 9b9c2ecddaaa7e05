"""Files beside the config are data: none is executed, whatever it is called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from bench.shared.processes import free_port
from launch.plan import ProcessSpec
from launch.surroundings import look_around
from orchestrator.compiled import ROOT
from orchestrator.interpreter import import_variables
from tests.launch.planning import config, model, only_worker, plan_of
from tests.waiting import running_with, wait_for

# Our packages, what they import of the standard library, and libraries that are needed at once.
OURS = ("worker", "orchestrator", "launch", "bench", "tests")
NAMES = (
    *OURS,
    *("logging", "socket", "random", "multiprocessing", "runpy", "json", "signal", "selectors", "typing"),
    *("uvicorn", "uvloop", "httptools", "fastapi", "httpx", "msgspec", "orjson", "numpy", "pydantic", "yaml"),
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # stands for an installed package
ENVIRONMENT.pop("PYTHONSAFEPATH", None)
INSTALLED = (sys.executable, "-P", "-m", "launch.cli")  # as the command `baton`, which is no module of `.`


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A directory; no file in it may be executed, else `executed` is there."""
    yield tmp_path
    executed = tmp_path / "executed"
    assert not executed.exists(), executed.read_text()


def lay(directory: Path, name: str, as_folder: bool) -> None:
    path = directory / (f"{name}/__init__.py" if as_folder else f"{name}.py")
    path.parent.mkdir(exist_ok=True)
    note = f"open({str(directory / 'executed')!r}, 'a').write({name!r} + ' ')"
    path.write_text(f"{note}\nraise SystemExit(f'this is not yours: {{__file__}}')\n")


def commands() -> list[ProcessSpec]:
    plan = plan_of(config(model(both={"engine": "sim"})), look_around())
    return list(plan.processes)


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_a_process_is_started_beside_a_file_of_this_name(trap: Path, name: str) -> None:
    lay(trap, name, as_folder=name in OURS)
    for spec in commands():
        assert output_of([*spec.argv, "--help"], trap, spec.env).startswith("usage: ")


def output_of(argv: Sequence[str], directory: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, cwd=directory, env={**ENVIRONMENT, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("command", ["up", "orchestrator"])
def test_everything_runs_beside_files_of_all_these_names(trap: Path, command: str) -> None:
    """With several processes, and one for large bodies."""
    for number, name in enumerate(NAMES):
        lay(trap, name, as_folder=bool(number % 2))
    listen = f"127.0.0.1:{free_port()}"
    path = trap / "c.yaml"
    pool = {"engine": "sim", "workers": [{"port": free_port(), "side_channel_port": free_port()}]}
    options = {"listen": listen, "admin": None, "processes": 2}
    path.write_text(json.dumps({"orchestrator": options, "models": [model(both=pool)]}))
    others = [] if command == "up" else [started(trap, "worker", "c.yaml", "m/both/0")]
    processes = [started(trap, command, "c.yaml"), *others]
    try:
        wait_for(lambda: is_ready(listen) or processes[0].poll() is not None, "a start")
        body = {"model": "m", "prompt": "x" * 2_000_000, "max_tokens": 1}
        answer = httpx.post(f"http://{listen}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
            process.wait()
        wait_for(lambda: not running_with(str(trap)), "the end of all processes")


def started(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (directory / f"{arguments[0]}.out").open("wb") as output:
        return subprocess.Popen(
            [*INSTALLED, *arguments], cwd=directory, env=ENVIRONMENT, stdout=output, stderr=output
        )


def is_ready(listen: str) -> bool:
    try:
        return httpx.get(f"http://{listen}/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_plan_says_so() -> None:
    for spec in commands():
        assert spec.env["PYTHONSAFEPATH"] == "1"


def test_a_checkout_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert import_variables({"PYTHONPATH": "/x"})["PYTHONPATH"] == f"{ROOT}:/x"
    monkeypatch.setattr(sys, "path", ["/usr/bin", *sys.path])
    assert import_variables({"PYTHONPATH": "/x"}) == {"PYTHONSAFEPATH": "1"}


def test_the_users_own_path_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    spec = only_worker({"engine": "sim", "env": {"PYTHONPATH": "/mine"}}, look_around())
    assert spec.env["PYTHONPATH"].startswith(f"{ROOT}:")
    assert spec.env["PYTHONPATH"].endswith(":/mine")
