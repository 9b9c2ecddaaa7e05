from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest

from launch.cli import main
from launch.exits import Exit
from launch.explain_route import shown
from orchestrator.config.options import RoutingConfig
from orchestrator.routing.dry_run import explain
from orchestrator.routing.planner import Planner
from tests.launch.runs import made_run
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest
from tests.orchestrator.routing.traffic import Traffic

BODY = b'{"model":"m","messages":[]}'
HEAD = {
    "process": {"index": 1, "pid": 71},
    "path": "/v1/chat/completions",
    "model": "m",
    "admission": {"waits": False, "why": "a seat is free"},
    "prompt_tokens": 250,
}


class Admin(HTTPServer):
    """It answers with what a test gives it, and remembers the last request."""

    status = 200
    content = b""
    path = ""
    headers: Any = None
    body = b""


class Handler(BaseHTTPRequestHandler):
    server: Admin

    def do_POST(self) -> None:
        server = self.server
        server.path, server.headers = self.path, self.headers
        server.body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(server.status)
        self.send_header("content-length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    for name in ("BATON_ADMIN_KEY", "BATON_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Admin(("127.0.0.1", 0), Handler) as server:
        server.content = json.dumps(document(prefill="round_robin")).encode()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "body.json"
    path.write_bytes(BODY)
    return str(path)


def document(**routing: Any) -> dict[str, Any]:
    registry = registry_of({"prefill": 2, "decode": 2, "both": 1})
    planner = Planner("m", RoutingConfig(**routing), random=Random(1), time=Clock())
    return HEAD | explain(planner, FakeRequest(bytes(1000)), registry.pools["m"], None, ())


def explained(admin: Admin, *arguments: str) -> int:
    return main(["explain-route", "--admin", f"http://127.0.0.1:{admin.server_port}", *arguments])


def test_a_request_is_sent_as_it_is_and_told_as_a_table(
    admin: Admin, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(admin, "-f", file) == Exit.OK
    assert (admin.path, admin.body) == ("/admin/explain?path=%2Fv1%2Fchat%2Fcompletions", BODY)
    assert "authorization" not in admin.headers
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "process 1 (pid 71), model m, /v1/chat/completions",
        "two workers serve it: m/prefill/0 prefills, m/decode/0 decodes",
        "",
        "prefill, by the policy round_robin: It is the next in turn.",
        "      worker       in_flight  turn",
        "  ->  m/prefill/0  0          0",
        "      m/prefill/1  0          1",
        "",
        "decode, by the policy least_loaded: It has the fewest legs under way.",
        "      worker      in_flight  legs",
        "  ->  m/decode/0  0          0",
        "      m/decode/1  0          0",
        "",
        "not considered:",
        "  m/both/0  two workers serve the request",
    ]


def test_as_json_it_is_what_the_orchestrator_tells(
    admin: Admin, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(admin, "-f", file, "-o", "json") == Exit.OK
    assert json.loads(capsys.readouterr().out) == json.loads(admin.content)


def test_the_options_say_what_is_not_in_the_body(
    admin: Admin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_API_KEY", "k3y")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    options = ["--path", "/v1/completions", "--avoid", "a/b/0", "--avoid", "a/b/1", "--process", "3"]
    assert explained(admin, "-f", "-", *options, "-H", "X-Session-Id: a b") == Exit.OK
    assert admin.path == "/admin/explain?path=%2Fv1%2Fcompletions&avoid=a%2Fb%2F0&avoid=a%2Fb%2F1&process=3"
    assert (admin.body, admin.headers["x-session-id"]) == (b"{}", "a b")
    assert admin.headers["authorization"] == "Bearer k3y"


def test_the_run_that_was_started_here_is_asked(
    admin: Admin, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path, admin=f"http://127.0.0.1:{admin.server_port}")
    assert main(["explain-route", "-f", file]) == Exit.OK
    assert admin.body == BODY


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (400, b'{"error":{"message":"the request body is not JSON"}}', "400: the request body is not JSON"),
        (200, b"<html>", "answered 200, but explains nothing"),
        (404, b"[]", "answered 404, but explains nothing"),
        (200, b"{}", "answered 200, but explains nothing"),
    ],
)
def test_what_is_no_explanation(
    status: int, content: bytes, says: str, admin: Admin, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.status, admin.content = status, content
    assert explained(admin, "-f", file) == Exit.FAILED
    shown_ = capsys.readouterr()
    assert shown_.out == ""
    assert says in shown_.err


def test_nobody_is_there(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-route", "-f", file, "--admin", "127.0.0.1:9"]) == Exit.FAILED
    assert "does not answer" in capsys.readouterr().err
    for url in ("http://[", "http://a b"):
        assert main(["explain-route", "-f", file, "--admin", url]) == Exit.USAGE
        assert f"--admin: expected http://HOST:PORT, got {url!r}" in capsys.readouterr().err


@pytest.fixture
def usual(admin: Admin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Admin:
    """A stranger listens at the usual address, and each run would give its key to who asks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("launch.explain_route.DEFAULT_ADMIN", f"http://127.0.0.1:{admin.server_port}")
    monkeypatch.setattr("launch.remote.key_of", lambda run: f"key-of-{run.directory.name}")
    return admin


def test_the_usual_address_is_asked_where_nothing_was_started(usual: Admin, file: str) -> None:
    assert main(["explain-route", "-f", file]) == Exit.OK
    assert usual.body == BODY
    assert "authorization" not in usual.headers


def test_of_several_runs_one_is_to_be_named(
    usual: Admin, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path, name="run-1", admin="http://127.0.0.1:9")
    meant = made_run(tmp_path, name="run-2", admin=f"http://127.0.0.1:{usual.server_port}")
    assert main(["explain-route", "-f", file]) == Exit.FAILED
    assert capsys.readouterr().err.startswith("2 runs are alive here; say which one is meant by --config")
    assert usual.body == b""
    assert main(["explain-route", "-f", file, "--state", str(meant)]) == Exit.OK
    assert usual.headers["authorization"] == "Bearer key-of-run-2"


def test_a_run_without_an_admin_listener_has_no_explanation(
    usual: Admin, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path, admin=None)
    assert main(["explain-route", "-f", file]) == Exit.FAILED
    assert "has no admin listener: give its config one" in capsys.readouterr().err
    assert usual.body == b""


def test_a_run_that_has_ended_is_said_to_have(
    usual: Admin, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path, ended=1.0)
    assert main(["explain-route", "-f", file]) == Exit.FAILED
    assert capsys.readouterr().err.startswith("nothing runs: the last run, ")
    assert usual.body == b""


@pytest.mark.parametrize(
    "arguments",
    [["-f", "/none/such"], ["-f", "{file}", "-H", "no colon"], ["-f", "{file}", "-H", "a: \n"]],
    ids=" ".join,
)
def test_a_wrong_command_line(arguments: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [argument.replace("{file}", file) for argument in arguments]
    assert main(["explain-route", *given]) == Exit.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_costs_are_columns() -> None:
    lines = [*shown(document(prefill="prefix", decode="least_tokens"))]
    header = next(line.split() for line in lines if "wait_s" in line)
    assert header[:2] == ["worker", "in_flight"]
    assert {"cost_s", "wait_s", "own_s", "evict_s", "cached_tokens", "rate"} <= {*header}
    (row,) = [line.split() for line in lines if "->" in line and "prefill" in line]
    assert len(row) == len(header) + 1


def test_one_worker_or_two_is_shown_once() -> None:
    """Of two, by the line of the plan; of one, by the plan itself."""
    told = document(prefill="prefix", disaggregate="auto")
    assert ["user-seconds with one" in line for line in shown(told)].count(True) == 1
    verdict = told["auto"]["reason"]
    told["plan"] = {"path": "aggregated", "prefill": None, "decode": "m/decode/0", "whole_reason": verdict}
    assert [verdict in line for line in shown(told)].count(True) == 1


def test_a_pair_is_shown_with_zones() -> None:
    traffic = Traffic(
        {"prefill": 2, "decode": 4},
        zones=2,
        link=lambda prefill, decode: 1.0 if prefill.zone == decode.zone else 20.0,
        prefill="prefix",
        decode="least_tokens",
    )
    for _ in range(60):
        traffic.ask(20_000)
        traffic.wait(0.3)
    told = HEAD | explain(traffic.planner, FakeRequest(bytes(20_000)), traffic.pools, None, ())
    lines = [*shown(told)]
    assert any(line.startswith("The pair of m/prefill/") for line in lines)
    assert any("zone 1" in line and "m/decode/" in line for line in lines)


def test_nobody_can_serve_it() -> None:
    told = HEAD | {"plan": None, "refused": "no decode worker is ready", "rejected": []}
    told["admission"] = {"waits": True, "why": "no seat is free, and 3 wait"}
    assert [*shown(told)] == [
        "process 1 (pid 71), model m, /v1/chat/completions",
        "first it waits: no seat is free, and 3 wait",
        "nobody can serve it: no decode worker is ready",
    ]
