"""The command: what `launch` starts."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from bench.shared.processes import free_port
from tests.contract.engines import CHAT
from tests.waiting import LIMIT_S, wait_for
from tests.worker.sim.asking import chat
from tests.worker.sim.workers import MODEL
from worker.sim.__main__ import main

ROLE = ["--model-name", MODEL, "--role", "decode"]


@contextmanager
def started(*argv: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.sim", *ROLE, *argv],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        with process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("ready: http://127.0.0.1:")
            yield process, ready.removeprefix("ready: ").strip()
            process.terminate()
    finally:
        watchdog.cancel()
        process.kill()


@pytest.mark.processes
def test_it_starts_serves_and_stops() -> None:
    with started("--max-model-len", "4096", "--record") as (process, url):
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert card["max_model_len"] == 4096
        answer = httpx.post(url + CHAT, json=chat())
        assert answer.status_code == 200
        (recorded,) = httpx.get(f"{url}/sim/requests").json()
        assert recorded["body"] == chat()
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.processes
@pytest.mark.parametrize("is_full", [True, False])
def test_it_serves_though_nobody_reads_that_it_is_ready(is_full: bool) -> None:
    port = free_port()
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.sim", *ROLE, "--port", str(port)],
            stdout=full if is_full else writing,
        )
    os.close(writing)
    try:
        wait_for(lambda: process.poll() is not None or is_healthy(port), "its health or its end")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def is_healthy(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    return False


@pytest.mark.processes
def test_it_starts_within_two_seconds_of_work() -> None:
    """In CPU time, as wall time is the machine's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with started():
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.processes
def test_flags_in_the_environment() -> None:
    faults = json.dumps([{"kind": "error", "status": 418, "leg": "aggregated", "count": 1}])
    env = {"BATON_TRANSPORT": "msgpack", "BATON_SIM_FAULTS": faults, "SIM_KEY": "secret"}
    with started("--fault", '{"kind": "stall", "leg": "health"}', "--api-key-env", "SIM_KEY", **env) as (
        _,
        url,
    ):
        assert httpx.get(f"{url}/baton/info").json()["decodes"] == ["json", "msgpack"]
        assert httpx.post(url + CHAT, json=chat()).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(url + CHAT, json=chat(), headers=headers).status_code == 418
        assert httpx.post(url + CHAT, json=chat(), headers=headers).status_code == 200
        kinds = [fault["kind"] for fault in httpx.get(f"{url}/sim/faults").json()]
        assert kinds == ["stall", "error"]


@pytest.mark.processes
def test_streams_end_as_aborted_when_it_is_stopped() -> None:
    slow = chat(max_tokens=100_000, ignore_eos=True, stream=True)
    with (
        started("--decode-ms-per-token", "50") as (process, url),
        httpx.stream("POST", url + CHAT, json=slow) as first,
        httpx.stream("POST", url + CHAT, json=slow) as second,
    ):
        told = [answer.iter_lines() for answer in (first, second)]
        for lines in told:
            next(lines)
        process.send_signal(signal.SIGTERM)
        for lines in told:
            *_, last, _, done, _ = lines
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
            assert done == "data: [DONE]"
        assert process.wait(LIMIT_S) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("argv", "env", "said"),
    [
        (["--fault", '{"kind": "fire"}'], {}, "Invalid value 'fire'"),
        (["--api-key-env", "UNSET_KEY"], {}, "UNSET_KEY is not set"),
        ([], {"BATON_TRANSPORT": "xml"}, "BATON_TRANSPORT='xml'"),
    ],
)
def test_bad_settings(
    argv: list[str],
    env: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main([*ROLE, *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--block-size", "0"], ["--lease-s", "-1"], ["--record", "-1"], ["--lease-s", "nan"]]
)
def test_bad_numbers(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main([*ROLE, *argv])
    assert exited.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([*ROLE, "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on" in capsys.readouterr().err


def test_a_side_channel_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exited:
        main([*ROLE, "--side-channel-port", str(taken.getsockname()[1])])
    assert exited.value.code
    assert "address already in use" in capsys.readouterr().err
