"""One process and several that may have few descriptors, or get SIGHUP before they serve."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

FEW = ("/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh")  # descriptors
SILENT = 400
ASKED = {"model": MODEL, "prompt": "Go on", "max_tokens": 3}


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as made:
        yield made


@pytest.fixture
def make(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Any]:
    with starting(tmp_path, workers) as start:
        yield start


@pytest.mark.parametrize("processes", [1, 2])
def test_silent_strangers_leave_descriptors_for_workers(make: Any, processes: int) -> None:
    orchestrator: Orchestrator = make(processes=processes, before=FEW)
    known = orchestrator.client()
    assert known.post("/v1/completions", json=ASKED).status_code == 200
    host, port = orchestrator.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(SILENT):
            stack.enter_context(socket.create_connection((host, int(port))))
        for _ in range(20):
            assert known.post("/v1/completions", json=ASKED).status_code == 200
            assert orchestrator.client().post("/v1/completions", json=ASKED).status_code == 200
        assert set(orchestrator.worker_states().values()) == {"ready"}
    assert "Too many open files" not in orchestrator.lines


@pytest.mark.parametrize("processes", [1, 2])
def test_sighup_during_the_start_kills_nothing(
    tmp_path: Path, workers: list[SimWorker], processes: int
) -> None:
    orchestrator = Orchestrator(tmp_path, workers, processes=processes)
    try:
        wait_for(lambda: _holds_sighup(orchestrator.process.pid), "the start")
        orchestrator.signal(signal.SIGHUP)
        orchestrator.wait_ready()
    finally:
        orchestrator.clean_up()


def _holds_sighup(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(blocked, 16) >> (signal.SIGHUP - 1) & 1)
