"""How the orchestrator starts in the foreground, and what keeps it from that."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from bench.shared.processes import free_port
from orchestrator.config.options import Config
from orchestrator.control.reload import ConfigSource
from orchestrator.errors import StartError
from orchestrator.run import run
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

SOURCE = ConfigSource("config.yaml")  # not read again
PROGRAM = """
import os, sys
from orchestrator.form import take_form
form = take_form(os.environ)  # before what has a compiled form is imported
from orchestrator.config.options import Config
from orchestrator.control.reload import ConfigSource
from orchestrator.run import StartError, run
try:
    sys.exit(run(Config.model_validate_json(sys.argv[1]), ConfigSource("config.yaml"), form))
except StartError as error:
    sys.exit(f"StartError: {error}")
"""


def config(**options: object) -> Config:
    model = {"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}
    return Config.model_validate({"orchestrator": options, "models": [model]})


def started(of: Config) -> subprocess.Popen[str]:
    """In a process of its own: it changes how all of a process logs."""
    command = [sys.executable, "-c", PROGRAM, of.model_dump_json()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_transport_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "pickle")
    with pytest.raises(StartError, match="must be one of json, orjson, msgpack, not 'pickle'"):
        run(config(), SOURCE)


def test_streams_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_STREAMS", "spdy")
    with pytest.raises(StartError, match="BATON_STREAMS must be one of http, mux, not 'spdy'"):
        run(config(), SOURCE)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_serves_until_it_is_told_to_stop(processes: int) -> None:
    port = free_port()
    process = started(config(listen=f"127.0.0.1:{port}", processes=processes))

    def is_up() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    with process:
        try:
            wait_for(is_up, "the orchestrator")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_port_that_is_taken_and_a_file_without_keys_are_errors(tmp_path: Path, processes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for options, why in (
            ({"listen": address}, f"cannot listen on {address}"),
            (
                {"listen": f"127.0.0.1:{free_port()}", "api_keys_file": str(tmp_path / "none")},
                "api_keys_file",
            ),
        ):
            _, lines = started(config(processes=processes, **options)).communicate(timeout=60)
            assert f"StartError: {why}" in lines
