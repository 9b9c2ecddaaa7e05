"""`baton up` and `baton worker` as a user runs them, with simulated workers."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from bench.shared.processes import free_port
from launch.exits import Exit
from tests.waiting import is_running, running_with, wait_for

pytestmark = pytest.mark.processes


class Baton:
    """A config on free ports, the processes that were started with it, and a name that finds them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = f"sim-{uuid4().hex}"
        self.listen, self.admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.started: list[subprocess.Popen[str]] = []
        config = {
            "orchestrator": {"listen": self.listen, "admin": self.admin},
            "models": [{"name": self.model, "prefill": self._pool(), "decode": self._pool()}],
        }
        self.config = directory / f"{self.model}.yaml"
        self.config.write_text(json.dumps(config))

    def _pool(self) -> dict[str, Any]:
        return {"engine": "sim", "workers": [{"port": free_port(), "side_channel_port": free_port()}]}

    def start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        """stdout is a pipe; stderr goes to a file, so that nobody waits for its reader."""
        with self.stderr_file.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", command, str(self.config), *arguments],
                cwd=self.directory,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def stderr_file(self) -> Path:
        return self.directory / "stderr"

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def running(self) -> set[int]:
        return running_with(self.model)

    def ask(self, **more: Any) -> httpx.Response:
        body = {"model": self.model, "prompt": "What is prefill?", "max_tokens": 8} | more
        return httpx.post(f"http://{self.listen}/v1/completions", json=body, timeout=60, trust_env=False)


@pytest.fixture
def baton(tmp_path: Path) -> Iterator[Baton]:
    made = Baton(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    wait_for(lambda: not made.running(), "the end of all processes")


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_start_answer_stop(baton: Baton) -> None:
    up = baton.start("up")
    assert first_line(up) == f"ready: http://{baton.listen}\n", baton.stderr
    assert len(baton.running()) == 4  # `up` itself, the orchestrator and two workers
    answer = baton.ask()
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-baton-path"] == "disaggregated"
    assert answer.json()["choices"][0]["text"]
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=100) == Exit.OK
    assert baton.running() == set()
    assert up.stdout is not None
    assert up.stdout.read() == ""
    assert f"{baton.model}/prefill/0: stopped" in baton.stderr
    logs = next((baton.directory / ".baton").iterdir())
    assert {log.name for log in logs.iterdir()} == {
        "orchestrator.log",
        "state.json",
        f"{baton.model}-prefill-0.log",
        f"{baton.model}-decode-0.log",
    }


def test_several_processes(baton: Baton) -> None:
    up = baton.start("up", "--set", "orchestrator.processes=2")
    assert first_line(up) == f"ready: http://{baton.listen}\n", baton.stderr
    processes = httpx.get(f"http://{baton.admin}/admin/processes", trust_env=False).json()
    assert baton.ask().headers["x-baton-path"] == "disaggregated"
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=100) == Exit.OK
    assert "orchestrator: stopped" in baton.stderr
    assert not any(is_running(process["pid"]) for process in processes)


def test_the_example_that_is_shown_works(baton: Baton) -> None:
    up = baton.start("up")
    assert first_line(up), baton.stderr
    wait_for(lambda: "try:\n" in baton.stderr and baton.stderr.endswith("\n"), "the example")
    command = next(line for line in baton.stderr.splitlines() if line.startswith("  curl "))
    _, url, _, header, _, body = shlex.split(command)
    name, value = header.split(": ")
    answer = httpx.post(url, headers={name: value}, content=body, timeout=60, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"]


def test_sigkill_leaves_nothing(baton: Baton) -> None:
    up = baton.start("up")
    assert first_line(up), baton.stderr
    up.kill()
    up.wait()
    wait_for(lambda: not baton.running(), "the end of all processes")


def test_a_worker_that_cannot_start(baton: Baton) -> None:
    up = baton.start("up", "--set", "models.0.decode.args=[--nonsense]")
    assert up.wait(timeout=100) == Exit.START_FAILED
    assert baton.running() == set()
    assert f"{baton.model}/decode/0 ended while starting, with exit code 2" in baton.stderr
    assert "unrecognized arguments: --nonsense" in baton.stderr
    assert "likely cause: the engine does not know one of the args" in baton.stderr
    assert first_line(up) == ""


def test_a_port_that_is_taken_is_found_before_anything_starts(baton: Baton) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        up = baton.start("up", "--set", f"models.0.decode.workers.0.port={port}")
        assert up.wait(timeout=100) == Exit.START_FAILED
    assert baton.stderr == (
        f"{baton.model}/decode/0: port {port} of 127.0.0.1 is taken by another process: "
        "give another one (base_port, or workers: [{port: ..., side_channel_port: ...}])\n"
    )
    assert not (baton.directory / ".baton").exists()


def test_each_process_alone_in_the_foreground(baton: Baton) -> None:
    workers = [baton.start("worker", f"{baton.model}/{role}/0") for role in ("prefill", "decode")]
    orchestrator = baton.start("orchestrator")
    wait_for(lambda: _is_ready(baton), "a whole path")
    assert baton.ask().headers["x-baton-path"] == "disaggregated"
    for process in (orchestrator, *workers):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) in (0, -signal.SIGTERM)


def _is_ready(baton: Baton) -> bool:
    try:
        return httpx.get(f"http://{baton.listen}/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_where_nothing_can_be_built_the_sources_serve(baton: Baton, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CC", "no-such-compiler"), ("BATON_FORM", "auto"), ("BATON_BUILDS", "builds")):
        monkeypatch.setenv(name, value)
    up = baton.start("up", "--compile")
    assert first_line(up) == f"ready: http://{baton.listen}\n", baton.stderr
    assert "the compiled form is not built: there is no no-such-compiler" in baton.stderr
    answer = httpx.get(f"http://{baton.listen}/health?verbose", trust_env=False)
    assert answer.json()["form"] == "pure"
    assert baton.ask().status_code == 200
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=100) == Exit.OK
    logs = next((baton.directory / ".baton").iterdir())
    said = "pure Python (no build of these sources is there) runs"
    assert said in (logs / "orchestrator.log").read_text()


def stream_of(baton: Baton) -> Any:
    """A request whose answer takes some seconds and comes token by token."""
    body = {"model": baton.model, "prompt": "What is prefill?", "max_tokens": 40, "stream": True}
    url = f"http://{baton.listen}/v1/completions"
    return httpx.stream("POST", url, json=body, timeout=60, trust_env=False)


SLOW = ("--set", "models.0.decode.args=[--decode-ms-per-token=100]")


def test_a_stream_under_way_is_finished_when_the_terminal_is_closed(baton: Baton) -> None:
    terminal, theirs = os.openpty()
    up = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "up", str(baton.config), *SLOW],
        cwd=baton.directory,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        shown = b""
        while b"try:" not in shown:
            shown += os.read(terminal, 65536)
        with stream_of(baton) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.close(terminal)
            wait_for(lambda: not _is_ready(baton), "the drain")
            up.send_signal(signal.SIGHUP)  # a shell sends it, too
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert up.wait(timeout=60) == Exit.OK
    finally:
        up.kill()
        up.wait()


def test_a_run_outlives_whoever_reads_what_it_shows(baton: Baton) -> None:
    reading, writing = os.pipe()
    up = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "up", str(baton.config), *SLOW],
        cwd=baton.directory,
        stdout=writing,
        stderr=writing,
        start_new_session=True,
    )
    os.close(writing)
    try:
        assert os.read(reading, 1)
        os.close(reading)
        wait_for(lambda: _is_ready(baton), "a whole path")
        state = next((baton.directory / ".baton").iterdir()) / "state.json"
        wait_for(lambda: json.loads(state.read_text())["is_ready"], "the start's end")
        up.send_signal(signal.SIGHUP)  # it says that it reloads
        with stream_of(baton) as answer:
            lines = answer.iter_lines()
            next(lines)
            up.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert up.wait(timeout=60) == Exit.OK
    finally:
        up.kill()
        up.wait()


def command(baton: Baton, *words: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(done, cwd=baton.directory, capture_output=True, text=True, timeout=60, check=False)


def test_other_commands_are_told_that_a_run_is_being_stopped(baton: Baton) -> None:
    up = baton.start("up", *SLOW)
    assert first_line(up), baton.stderr
    again = command(baton, "up", str(baton.config))
    assert again.returncode == Exit.START_FAILED
    first, *ports = again.stderr.splitlines()
    assert first == "a run of this config is alive: see `baton ps`; `baton down` stops it"
    assert all("is taken by another process" in line for line in ports)
    with stream_of(baton) as answer:
        lines = answer.iter_lines()
        next(lines)
        up.send_signal(signal.SIGINT)
        wait_for(lambda: not _is_ready(baton), "the drain")
        shown = command(baton, "ps")
        assert shown.stdout.splitlines()[0].endswith(", stopping"), shown
        assert ["orchestrator", "stopping"] in [line.split()[:2] for line in shown.stdout.splitlines()], shown
        refused = command(baton, "scale", f"{baton.model}/decode", "2")
        assert refused.returncode == Exit.FAILED
        assert "is being stopped, or has ended: it takes no commands" in refused.stderr
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert up.wait(timeout=60) == Exit.OK
