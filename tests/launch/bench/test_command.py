"""`baton bench` as a user runs it: against a simulated worker, a whole Baton, and what is no endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from bench.shared.processes import free_port
from launch.bench.profiles import PROFILES, Bench, Plan
from launch.bench.results import load
from launch.cli import main
from launch.exits import Exit
from tests.waiting import wait_for
from tests.worker.sim.workers import MODEL, Worker, running

QUICK = ("--duration", "0.3", "--rate", "20")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with running(max_model_len=20_000) as made:
        yield made


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


# --- what it measures ---------------------------------------------------------------------------


def test_quick(worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "a.json", tmp_path / "a.svg"
    assert bench(worker.url, *QUICK, "--output", str(file), "--plot", str(picture)) == Exit.OK
    shown = capsys.readouterr()
    assert shown.err == ""
    assert f"{MODEL} at {worker.url}/v1" in shown.out
    assert "chat, 20 req/s: 6 of 6 answered" in shown.out
    found = load(str(file))
    (step,) = found.steps
    assert (step.ok, step.errors) == (6, {})
    assert 0 < step.times["itl"].count <= step.output_tokens - 6
    assert step.prompt_tokens / 6 == pytest.approx(256, rel=0.5)
    assert step.cached_tokens < step.prompt_tokens / 2
    assert step.client.connects + step.client.reuses >= 6
    assert picture.stat().st_size > 0


def test_the_endpoint_decides_nothing_about_the_length(worker: Worker, tmp_path: Path) -> None:
    """So that two endpoints are asked for the same work."""
    file = str(tmp_path / "a.json")
    assert bench(worker.url, *QUICK, "--output", file) == Exit.OK
    first = load(file)
    assert first.setup.fixed_length
    assert bench(worker.url, *QUICK, "--output", file) == Exit.OK
    assert load(file).steps[0].output_tokens == first.steps[0].output_tokens


def test_matrix_and_comparison(worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file in files:
        options = ("--profile", "matrix", "--concurrency", "1,3", "--workload", "chat,multi-turn")
        assert bench(worker.url, *options, "--duration", "0.1", "--output", file) == Exit.OK
    names = [(step.workload, str(step.load)) for step in load(files[0]).steps]
    assert names == [(name, f"{n} at once") for name in ("chat", "multi-turn") for n in (1, 3)]
    capsys.readouterr()
    assert bench("--compare", *files) == Exit.OK
    shown = capsys.readouterr().out
    assert "multi-turn, 3 at once  ttft p99 ms" in shown
    assert "warning" not in shown


def test_sustained(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is good enough, so that the search goes down and ends soon."""
    options = ("--profile", "sustained", "--rate", "150", "--duration", "0.01", "--slo-ttft-ms", "0.0001")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.bench.profiles._LOWEST_RATE", 50)
        assert bench(worker.url, *options) == Exit.OK
    assert "chat: no rate could be sustained (95% good)" in capsys.readouterr().out


def test_what_the_model_has_no_room_for_is_left_out(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(worker.url, *QUICK, "--workload", "agentic,chat") == Exit.OK
    assert "agentic left out: it needs 40128 tokens, sim-model takes 20000" in capsys.readouterr().err
    assert bench(worker.url, *QUICK, "--workload", "agentic") == Exit.USAGE
    assert "no workload is left" in capsys.readouterr().err


def test_an_ab_test(worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "ab.json", tmp_path / "ab.png"
    arms = (f"json={worker.url}", f"msgpack={worker.url}/v1")
    options = ("--rounds", "2", "--workload", "chat", "--output", str(file), "--plot", str(picture))
    assert bench("--ab", "transport", *arms, *QUICK, *options) == Exit.OK
    assert "transport: 2 rounds, ratios to json" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert {label: len(steps) for label, steps in written["steps"].items()} == {
        "json": 2,
        "msgpack": 2,
        "json again": 2,
    }
    assert {ratio["arm"] for ratio in written["ratios"]} == {"msgpack"}
    assert picture.stat().st_size > 0


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with running(api_keys=("s3cret",)) as closed:
        assert bench(closed.url, *QUICK) == Exit.FAILED
        assert "is the key in BATON_API_KEY or OPENAI_API_KEY right?" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        assert bench(closed.url, *QUICK) == Exit.OK
    shown = capsys.readouterr()
    assert "s3cret" not in shown.out + shown.err


def test_errors_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The endpoint breaks after it was looked at: it cuts five answers after a third token.

    Two of these are the probe's, which has two tokens only, and one is the warm-up's.
    """
    file = str(tmp_path / "a.json")
    with running() as broken:
        broken.add_fault("truncate", at_token=3, count=5)
        assert bench(broken.url, *QUICK, "--output", file) == Exit.OK
    (step,) = load(file).steps
    assert (step.requests, step.ok, step.errors) == (6, 4, {"broken stream": 2})
    assert "2 x broken stream, the first: the stream ended without [DONE]" in capsys.readouterr().out


def test_a_run_without_an_answer_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as broken:
        broken.add_fault("reset", at_token=3)
        assert bench(broken.url, *QUICK) == Exit.FAILED
    shown = capsys.readouterr()
    assert "6 x cut short" in shown.out
    assert shown.err == "baton bench: not one request was answered\n"


# --- Baton itself -------------------------------------------------------------------------------


@contextmanager
def baton(directory: Path, prefill: str, decode: str) -> Iterator[str]:
    """The URL of an orchestrator in a process of its own, in front of these workers."""
    listen = f"127.0.0.1:{free_port()}"
    config = {
        "orchestrator": {"listen": listen},
        "models": [{"name": MODEL, "prefill": {"urls": [prefill]}, "decode": {"urls": [decode]}}],
    }
    file = directory / "c.yaml"
    file.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "launch.cli", "orchestrator", str(file)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: is_ready(f"http://{listen}"), "a whole path")
            yield f"http://{listen}"
        finally:
            process.send_signal(signal.SIGTERM)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.processes
def test_the_stages_of_baton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "a.json")
    with (
        running(role="prefill") as prefill,
        running(role="decode") as decode,
        baton(tmp_path, prefill.url, decode.url) as url,
    ):
        assert bench(url, *QUICK, "--output", file) == Exit.OK
    (step,) = load(file).steps
    assert step.ok == 6
    assert step.paths == {"disaggregated": 6}
    assert {name: stage.count for name, stage in step.stages.items()} == {
        "queue": 6,
        "prefill": 6,
        "decode": 6,
    }
    assert "server: prefill" in capsys.readouterr().out


# --- bad input ----------------------------------------------------------------------------------


class _Refusing(BaseHTTPRequestHandler):
    status = 404
    body = b"<html>not here</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@contextmanager
def web_server(answer_status: int) -> Iterator[str]:
    handler = type("Handler", (_Refusing,), {"status": answer_status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("baton bench: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_url_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(f"http://127.0.0.1:{free_port()}") == Exit.FAILED
    assert "no connection: Connection refused" in one_line(capsys)


def test_a_host_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://no-such-host.invalid") == Exit.FAILED
    assert "no connection" in one_line(capsys)


@pytest.mark.parametrize(
    ("status", "said"), [(404, "it answers 404"), (500, "it answers 500"), (200, "is none")]
)
def test_a_web_server_is_no_endpoint(status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with web_server(status) as url:
        assert bench(url) == Exit.FAILED
    line = one_line(capsys)
    assert "is no OpenAI endpoint" in line
    assert said in line


def test_what_speaks_no_http(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = Thread(target=greet)
        thread.start()
        assert bench(f"http://127.0.0.1:{listener.getsockname()[1]}") == Exit.FAILED
        thread.join()
    assert "the answer is not HTTP" in one_line(capsys)


def test_completions_that_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as broken:
        broken.add_fault("error", status=503)
        assert bench(broken.url) == Exit.FAILED
    assert "a chat completion failed: http 503" in one_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["http://a", "http://b"],
        ["a"],
        ["http://key@a"],
        ["http://a", "--output", "no/such/directory/a.json"],
        ["http://a", "--plot", "a.txt"],
        ["--ab", "transport", "a=http://a"],
        ["--ab", "transport", "a=http://a", "a=http://b"],
        ["--ab", "transport", "http://a", "http://b"],
        ["http://a", "--compare", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == Exit.USAGE
    one_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "0"],
        ["--rate", "inf"],
        ["--duration", "x"],
        ["--workload", "chat,nonsense"],
        ["--concurrency", "1,0"],
        ["--slo-share", "1.5"],
        ["--profile", "slow"],
        ["--ab", "nonsense"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench("http://a", *arguments)
    assert caught.value.code == Exit.USAGE
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--compare", str(tmp_path / "a"), str(tmp_path / "b")) == Exit.FAILED
    assert "No such file" in one_line(capsys)


@pytest.mark.parametrize("steps", [0, 1])
def test_ctrl_c_reports_what_was_found(
    steps: int, worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def interrupted(bench: Bench, plan: Plan) -> None:
        for _ in range(steps):
            await bench.step(plan.workloads[0], plan.load(plan.workloads[0]), plan.duration_s)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setitem(PROFILES, "quick", interrupted)
    assert bench(worker.url, *QUICK) == Exit.INTERRUPTED
    shown = capsys.readouterr()
    assert shown.err == "baton bench: interrupted\n"
    assert shown.out.count("6 of 6 answered") == steps
