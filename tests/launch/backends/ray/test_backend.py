"""Without a cluster: what is wrong is named, with what to do. A module of its name stands in for Ray."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.shared.processes import free_port
from launch.backends.base import BackendError
from launch.backends.ray import link
from launch.backends.ray.backend import RayBackend, passed_on
from launch.exits import Exit
from launch.local.processes import Guard
from launch.local.run_state import FILE, read
from launch.plan import placed_spec
from tests.launch.planning import config, model

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[4]
CONFIG = "models: [{name: m, both: {engine: sim}}]\norchestrator: {listen: '127.0.0.1:%d'}\n"
MISMATCH = "Version mismatch: The cluster was started with: Ray: 2.60.0 Python: 3.12.1"


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the stand-in, for what is started."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    return folder / "ray.py"


REFUSALS = {
    f"raise RuntimeError({MISMATCH!r})": f"{MISMATCH}: have one version of Ray, and of Python, on all nodes",
    "raise ConnectionError('none')": "no cluster of Ray runs on this machine: join one by `ray start",
    "import os; print('dies', flush=True); os.abort()": "the process that talks to Ray has ended: .*dies",
    "raise KeyError('?')": r"Ray refuses: KeyError: '\?'",
}


@pytest.mark.parametrize(("init", "told"), REFUSALS.items(), ids=["version", "none", "dies", "unknown"])
def test_a_cluster_that_cannot_be_connected_to(ray: Path, init: str, told: str) -> None:
    ray.write_text(f"def init(**options):\n    {init}\n")
    with pytest.raises(BackendError, match=told):
        RayBackend.sweep({"address": "auto", "namespace": "n"})


def test_a_head_that_does_not_answer(ray: Path) -> None:
    ray.write_text("")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(BackendError, match=f"no head of Ray answers at {address}: .*refused"):
        RayBackend.sweep({"address": address, "namespace": "n"})


def test_up_says_that_ray_is_not_installed(ray: Path, tmp_path: Path) -> None:
    ray.write_text("raise ImportError('No module named ray')")
    (tmp_path / "c.yaml").write_text(CONFIG % free_port())
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "up", "--on", "ray", "c.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == Exit.START_FAILED
    assert "Ray is not installed here (No module named ray): pip install 'baton-serve[ray]'" in done.stderr
    assert "has ended" not in done.stderr
    (file,) = tmp_path.glob(f"**/{FILE}")
    state = read(file)
    assert (state.is_alive(), state.has_left_workers(), state.handle) == (False, False, {})


def test_a_cluster_that_was_never_connected_to_has_nothing_to_be_swept(ray: Path, tmp_path: Path) -> None:
    ray.write_text("def init(**options):\n    raise ConnectionError('none')\n")

    async def open_and_close() -> None:
        with Guard() as guard:
            made = RayBackend(config(model(both={"engine": "sim"})), tmp_path, lambda text: None, guard)
            assert made.handle == {}
            with pytest.raises(BackendError, match="no cluster of Ray runs on this machine"):
                await made.open([placed_spec("m/both/0", "both")])
            assert made.handle == {}
            await made.close()

    asyncio.run(open_and_close())


AGENT = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"done": {"address": "head:6379"}} if asked["do"] == "open" else {"error": "the head is away"}
    print(json.dumps({"id": asked["id"], **answer}), flush=True)
"""


@pytest.mark.parametrize("address", ["auto", "local"])
def test_workers_that_cannot_be_ended_at_the_end_are_told_of(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not those of a cluster that ends with us."""
    monkeypatch.setattr(link, "COMMAND", (sys.executable, "-c", AGENT))

    async def open_and_close() -> None:
        with Guard() as guard:
            options = config(model(both={"engine": "sim"}), launch={"ray": {"address": address}})
            made = RayBackend(options, tmp_path, lambda text: None, guard)
            await made.open([placed_spec("m/both/0", "both")])
            if address == "local":
                await made.close()
                return
            for _ in range(2):
                with pytest.raises(BackendError, match="workers may be left in Ray: "):
                    await made.close()

    asyncio.run(open_and_close())


def test_workers_get_what_both_sides_have_to_agree_on() -> None:
    ours = {"BATON_TRANSPORT": "msgpack", "BATON_STREAMS": "mux", "BATON_WORKER_API_KEY": "k"}
    assert passed_on({**ours, "PATH": "/bin", "BATON_RUN_KEY": "of this run alone"}) == ours
    assert passed_on({"BATON_STREAMS": "mux"}) == {"BATON_STREAMS": "mux"}
