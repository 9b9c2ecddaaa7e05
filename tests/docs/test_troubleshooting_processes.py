"""Symptoms of docs/troubleshooting.md that show themselves only when everything runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.shared.processes import free_port
from tests.docs.symptoms import check, makes, rendered
from tests.orchestrator.running import Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def shown(answer: httpx.Response) -> str:
    return rendered(answer.status_code, answer.headers, answer.content)


def counted(orchestrator: Orchestrator) -> str:
    """What is not 0 of the metrics."""
    lines = orchestrator.admin("/metrics").text.splitlines()
    return "\n".join(line for line in lines if not line.startswith("#") and not line.endswith(" 0.0"))


class Up:
    """`baton up` of a simulated cluster, to its end or until it is stopped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listen = f"127.0.0.1:{free_port()}"
        self.config: dict[str, Any] = {
            "orchestrator": {"listen": self.listen},
            "models": [{"name": "sim", **{role: self._pool() for role in ("prefill", "decode")}}],
        }

    def _pool(self) -> dict[str, Any]:
        return {"engine": "sim", "workers": [{"port": free_port(), "side_channel_port": free_port()}]}

    def command(self, name: str) -> list[str]:
        (self.directory / "baton.yaml").write_text(json.dumps(self.config))
        return [sys.executable, "-m", "launch.cli", name, "baton.yaml"]

    def to_its_end(self, name: str = "up") -> str:
        done = subprocess.run(
            self.command(name), cwd=self.directory, capture_output=True, text=True, timeout=100, check=False
        )
        return f"{done.stdout}{done.stderr}exit code {done.returncode}"


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


@makes("A worker ends while it starts")
def test_a_worker_that_does_not_start(up: Up) -> None:
    up.config["models"][0]["decode"]["args"] = ["--no-such-option"]
    check("A worker ends while it starts", up.to_its_end())


@makes("`baton up` is not ready in time")
def test_a_start_that_takes_too_long(up: Up) -> None:
    up.config["launch"] = {"start_timeout_s": 3}
    up.config["models"][0]["decode"]["args"] = ["--fault", '{"kind": "error", "leg": "health"}']
    check("`baton up` is not ready in time", up.to_its_end())


@makes("`baton orchestrator` cannot listen")
def test_an_orchestrator_without_a_port(up: Up) -> None:
    with simulated("prefill") as [worker]:
        up.config["orchestrator"]["listen"] = worker.url.removeprefix("http://")
        check("`baton orchestrator` cannot listen", up.to_its_end("orchestrator"))


@makes("A worker dies again and again")
def test_a_worker_that_dies(up: Up, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(up.command("up"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"ready")
        wait_for(lambda: _kill_one_of(tmp_path), "a worker to kill")
        wait_for(lambda: "starts again" in (tmp_path / "stderr").read_text(), "a word on it")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    check("A worker dies again and again", (tmp_path / "stderr").read_text())


def _kill_one_of(directory: Path) -> bool:
    """Kill the decode worker that was started from this directory."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if _is_decode_of(path, directory)
    ]
    for pid in found:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    return bool(found)


def _is_decode_of(path: Path, directory: Path) -> bool:
    try:
        return b"worker.sim" in path.read_bytes() and (
            b"\0decode\0" in path.read_bytes() and (path.parent / "cwd").readlink() == directory
        )
    except OSError:
        return False


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as made:
        yield made


@makes("`/ready` is 503")
def test_a_cluster_that_lacks_a_worker(tmp_path: Path, workers: list[SimWorker]) -> None:
    workers[1].kill()
    orchestrator = Orchestrator(tmp_path, workers, processes=1)
    try:
        wait_for(lambda: "cannot be used" in orchestrator.lines, "a word on it")
        answer = httpx.get(f"{orchestrator.url}/ready", trust_env=False)
        chat = httpx.post(f"{orchestrator.url}/v1/chat/completions", json=CHAT, trust_env=False)
        check("`/ready` is 503", "\n".join([shown(answer), shown(chat), orchestrator.lines]))
    finally:
        orchestrator.clean_up()


@makes("A process of the orchestrator has ended")
def test_a_process_that_is_killed(tmp_path: Path, workers: list[SimWorker]) -> None:
    with starting(tmp_path, workers) as start:
        orchestrator = start()
        os.kill(orchestrator.serving()[0]["pid"], signal.SIGKILL)
        wait_for(lambda: "what it was serving is lost" in orchestrator.lines, "a word on it")
        orchestrator.wait_ready()
        metrics = counted(orchestrator)
        check("A process of the orchestrator has ended", f"{orchestrator.lines}\n{metrics}")


@makes("A process of the orchestrator stands still")
def test_a_process_that_is_stopped(tmp_path: Path, workers: list[SimWorker]) -> None:
    with starting(tmp_path, workers) as start:
        orchestrator = start(hang_timeout_s=3)
        os.kill(orchestrator.serving()[0]["pid"], signal.SIGSTOP)
        wait_for(lambda: "stood still" in orchestrator.lines, "a word on it")
        wait_for(lambda: 'ends_total{reason="died"} 1.0' in counted(orchestrator), "its end to be counted")
        orchestrator.wait_ready()
        metrics = counted(orchestrator)
        check("A process of the orchestrator stands still", f"{orchestrator.lines}\n{metrics}")


@makes("503 `too_many_connections`")
def test_more_connections_than_there_may_be(tmp_path: Path, workers: list[SimWorker]) -> None:
    with starting(tmp_path, workers) as start:
        orchestrator = start(processes=1, max_connections=2)
        clients = [orchestrator.client(), orchestrator.client()]
        body = {"model": "m", "prompt": "Go on", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        streams = [
            client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)
            for client in clients
        ]
        assert [stream.status_code for stream in streams] == [200, 200]
        answer = orchestrator.client().post("/v1/chat/completions", json=CHAT)
        wait_for(lambda: "are in use" in orchestrator.lines, "a word on it")
        check("503 `too_many_connections`", f"{shown(answer)}\n{orchestrator.lines}")
        for client in clients:
            client.close()
