"""One process or several: what became of requests is known of all of them, and events have one order."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.cli import main
from launch.exits import Exit
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Go on"}], "max_tokens": 4}
FAILS = {"kind": "error", "leg": "prefill", "status": 500}
HOSTILE = [
    b"\x1b[31mred",
    b"<script>alert(1)</script>",
    b"\xff\xfe\x80",
    "zu groß".encode(),
    b"x" * 20_000,
    b"a\tb; c='d\"",
]


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "prefill", "decode", "decode") as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def orchestrator(
    request: pytest.FixtureRequest, tmp_path: Path, workers: list[SimWorker]
) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=request.param, routing={"prefill": "round_robin"})


def told(orchestrator: Orchestrator, name: str) -> dict[str, Any]:
    found: dict[str, Any] = orchestrator.admin(f"/admin/requests/{name}").json()
    return found


def listed(orchestrator: Orchestrator, query: str = "") -> list[dict[str, Any]]:
    answer = orchestrator.admin(f"/admin/requests{query}").json()
    assert answer["unanswered"] == []
    found: list[dict[str, Any]] = answer["requests"]
    return found


def test_what_became_of_requests(
    orchestrator: Orchestrator, workers: list[SimWorker], capsys: pytest.CaptureFixture[str]
) -> None:
    clients = orchestrator.client_of_each()
    for index, client in enumerate(clients):  # by the header, and by the id in the body, of each process
        answer = client.post("/v1/chat/completions", json=CHAT)
        named = client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": f"own-{index}"})
        for name in (answer.headers["x-request-id"], answer.json()["id"]):
            assert told(orchestrator, name)["process"] == index
        assert (named.headers["x-request-id"], named.json()["id"]) == (
            f"own-{index}",
            f"chatcmpl-own-{index}",
        )
        assert told(orchestrator, f"chatcmpl-own-{index}")["id"] == f"own-{index}"
    assert len(listed(orchestrator)) == 2 * len(clients)
    received = [request["received"] for request in listed(orchestrator)]
    assert received == sorted(received, reverse=True)

    stream = Stream(clients[-1], 100_000)
    [under_way] = [request for request in listed(orchestrator) if request["state"] != "ended"]
    assert (under_way["state"], under_way["stream"], under_way["status"]) == ("is answered", True, 200)
    stream.leave()
    wait_for(lambda: told(orchestrator, under_way["id"])["client_gone"], "the client to be gone")

    httpx.post(f"{workers[0].url}/sim/faults", json=FAILS, trust_env=False).raise_for_status()
    names = [f"after-{index}" for index in range(4)]  # two of them come to the worker that fails
    for name in names:
        client = orchestrator.client()
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": name})
        assert answer.status_code == 200
    failed = [request["id"] for request in listed(orchestrator, "?failed=1")]
    assert set(failed) & set(names)
    one = told(orchestrator, next(name for name in names if name in failed))
    assert one["failed_attempts"][0]["worker"] == f"{MODEL}/prefill/0"
    assert one["plan"]["prefill"]["worker"] == f"{MODEL}/prefill/1"
    assert one["plan"]["prefill"]["rejected"][0]["worker"] == f"{MODEL}/prefill/0"
    resent = orchestrator.admin("/admin/events?kind=request").json()
    assert {event["kind"] for event in resent} == {"request.resent"}
    assert all(event["subject"] == f"{MODEL}/prefill/0" for event in resent)

    at = ["--admin", orchestrator.admin_url]
    assert main(["trace", one["id"], *at]) == Exit.OK
    text = capsys.readouterr().out
    assert "m/prefill/0 failed it" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert main(["trace", "--failed", *at]) == Exit.OK
    assert one["id"] in capsys.readouterr().out


def test_hostile_names_break_nothing(orchestrator: Orchestrator, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--admin", orchestrator.admin_url]
    for name in HOSTILE:
        answer = orchestrator.client().post(
            "/v1/chat/completions",
            json=CHAT,
            headers=[(b"x-request-id", name)],  # type: ignore[list-item]
        )
        assert answer.status_code in (200, 400, 431)  # or the worker does not take such a name
        orchestrator.client().post(
            "/v1/chat/completions", json=CHAT | {"request_id": name.decode("latin-1"), "model": "\x1b[2J"}
        )
    assert main(["trace", *at]) == Exit.OK
    out = capsys.readouterr().out
    for request in listed(orchestrator):
        assert main(["trace", request["id"], *at]) == Exit.OK
        out += capsys.readouterr().out
    assert "\x1b" not in out
    assert all(line.isprintable() for line in out.splitlines())
    asked = socket.create_connection(tuple(orchestrator.admin_url[7:].split(":")), timeout=20)  # type: ignore[arg-type]
    with asked:
        asked.sendall(b"GET /admin/requests/" + b"x" * 1_000_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert asked.recv(100).startswith((b"HTTP/1.1 414", b"HTTP/1.1 431"))
    assert orchestrator.client().post("/v1/chat/completions", json=CHAT).status_code == 200


def refused(
    orchestrator: Orchestrator, path: str, fields: dict[str, str]
) -> tuple[http.client.HTTPResponse, str]:
    """What comes back for a head, and the code of the error in it."""
    connection = http.client.HTTPConnection(orchestrator.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.putrequest("POST", path)
        for name, value in fields.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer, json.loads(answer.read())["error"]["code"]


def test_what_the_server_refuses_is_known_too(
    orchestrator: Orchestrator, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--admin", orchestrator.admin_url]
    for path, fields, api, status in (
        ("/v1/chat/completions", {"content-length": str(10**12)}, "/v1/chat/completions", 413),
        ("/v1/completions/", {"x-filler": "x" * 100_000}, "/v1/completions", 431),
        ("/secret/path", {"content-length": str(10**12), "x-request-id": "own"}, "other", 413),
        ("/v1/embeddings", {"content-length": "x"}, "/v1/embeddings", 400),
    ):
        answer, code = refused(orchestrator, path, fields)
        name = answer.headers["x-request-id"]
        one = told(orchestrator, name)
        assert (one["api"], one["status"], one["error"]) == (api, answer.status, code) == (api, status, code)
        assert main(["trace", name, *at]) == Exit.OK
        assert capsys.readouterr().out.startswith(f"request {name}: {status} ")
        wait_for(
            lambda name=name, status=status: f"ACCESS {name} {status} " in orchestrator.lines, "its line"
        )
    assert "secret" not in orchestrator.lines
    assert main(["trace", "a\nb", *at]) == Exit.FAILED
    assert "no request 'a\\nb' is known" in capsys.readouterr().err.replace("\\\\", "\\")


def test_events_are_followed_until_the_orchestrator_ends(orchestrator: Orchestrator) -> None:
    seen: list[dict[str, Any]] = []
    url = f"{orchestrator.admin_url}/admin/events?follow=1"
    with httpx.stream("GET", url, timeout=60, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        orchestrator.change("POST", f"/admin/workers/{MODEL}/decode/1/drain")
        lines = answer.iter_lines()
        for line in lines:
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
                if seen[-1]["kind"] == "admin.drain":
                    break
        numbers = [event["number"] for event in seen]
        assert numbers == [*range(1, len(numbers) + 1)]
        began = time.monotonic()
        orchestrator.process.terminate()
        assert orchestrator.wait_exit() == 0
        assert time.monotonic() - began < 30.0  # whoever follows does not hold up the end
        with contextlib.suppress(httpx.TransportError):
            assert not [line for line in lines if line.startswith("data: ")]
    assert "Traceback" not in orchestrator.lines


def test_a_process_that_dies_is_an_event(tmp_path: Path, workers: list[SimWorker]) -> None:

    with starting(tmp_path, workers) as start:
        orchestrator = start(processes=2)
        os.kill(orchestrator.serving()[0]["pid"], signal.SIGKILL)
        wait_for(
            lambda: (
                "process.died"
                in [event["kind"] for event in orchestrator.admin("/admin/events?kind=process").json()]
            ),
            "the event of a process that died",
        )
