"""`baton trace` and `baton events`, by what an admin listener answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import events
from launch.cli import main
from launch.exits import Exit
from tests.launch.runs import admin_listener, made_run

ESCAPES = "\x1b[31m\r\nforged\x07é\u202e"
ONE: dict[str, Any] = {
    "id": "req-1",
    "received": 1796046579.635916,
    "state": "ended",
    "key": "alice",
    "api": "/v1/chat/completions",
    "model": "m",
    "stream": True,
    "status": 200,
    "error": None,
    "path": "disaggregated",
    "prefill_worker": "m/prefill/1",
    "decode_worker": "m/decode/0",
    "attempts": 2,
    "total_ms": 3131.737,
    "bytes_in": 72,
    "bytes_out": 771,
    "process": 1,
    "answer_id": "chatcmpl-req-2-3",
    "worker_id": "req-2-3",
    "client_gone": False,
    "stages": {},
    "timeline": [
        {"ms": 0.0, "what": "arrived", "worker": None},
        {"ms": 3100.25, "what": "prefill sent", "worker": "m/prefill/1"},
    ],
    "failed_attempts": [
        {"worker": "m/prefill/0", "outcome": "silent", "at_ms": 1.0, "took_ms": 3099.0, "then": "resent"}
    ],
    "handoff": {
        "kv": "transferred",
        "given_up": None,
        "lease": "consumed: the decode worker pulled the blocks",
    },
    "tokens": {"prompt_estimated": 460, "prompt_cached": 64},
    "plan": {
        "whole_reason": None,
        "prefill": {
            "worker": "m/prefill/1",
            "reason": "It costs the least, 0.017 s.",
            "terms": {"cost_s": 0.01748, "tokens": 460.0},
            "candidates": [
                {"worker": "m/prefill/1", "chosen": True, "terms": {"cost_s": 0.01748, "tokens": 460.0}},
                {"worker": "m/prefill/2", "chosen": False, "terms": {}},
            ],
            "candidates_in_all": 12,
            "rejected": [
                {"worker": "m/prefill/0", "why": "it had failed the request: silent", "state_now": "ejected"}
            ],
        },
        "decode": {
            "worker": "m/decode/0",
            "reason": "It has the fewest legs under way.",
            "terms": {},
            "candidates": [{"worker": "m/decode/0", "chosen": True, "terms": {}}],
            "candidates_in_all": 1,
            "rejected": [],
        },
    },
    "others_with_this_id": 2,
}


def hostile(value: Any) -> Any:
    """The same document, every text of which is hostile; what a program goes by stays."""
    if isinstance(value, dict):
        kept = ("state", "kv", "then")
        return {name: one if name in kept else hostile(one) for name, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value + ESCAPES * 10 if isinstance(value, str) else value


def asked(document: Any, *arguments: str, path: str = "/admin/requests/req-1") -> tuple[int, list[str]]:
    """The exit code of a command, and what it asked for."""
    with admin_listener({path: document}) as admin:
        code = main([*arguments, "--admin", admin.url])
        return code, admin.paths("GET")


def test_one_request_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(ONE, "trace", "req-1") == (Exit.OK, ["/admin/requests/req-1"])
    assert capsys.readouterr().out.splitlines() == [
        "request req-1: 200 in 2 attempts, 3131.7 ms",
        "  /v1/chat/completions, model m, a stream, key alice",
        "  72 bytes in, 771 bytes out, about 460 prompt tokens, 64 of them cached",
        "  arrived 2026-11-30 13:49:39.635 UTC, at process 1",
        "  its answer is called chatcmpl-req-2-3",
        "  the newest of 3 requests with this id",
        "",
        "       0.0 ms  arrived",
        "    3100.2 ms  prefill sent  m/prefill/1",
        "",
        "m/prefill/0 failed it after 3.1 s: silent; it was sent elsewhere.",
        "m/prefill/1 prefills: It costs the least, 0.017 s.",
        "  -> m/prefill/1  cost_s 0.01748, tokens 460",
        "     m/prefill/2",
        "     and 10 more",
        "  not m/prefill/0: it had failed the request: silent; it is ejected now",
        "m/decode/0 decodes: It has the fewest legs under way.",
        "",
        "hand-off: the KV cache went over",
        "lease: consumed: the decode worker pulled the blocks",
    ]


@pytest.mark.parametrize("document", [ONE, hostile(ONE)], ids=["plain", "hostile"])
def test_a_terminal_of_80_columns_shows_it_whatever_is_in_it(
    document: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(document, "trace", "req-1")[0] == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_one_that_is_under_way_and_one_that_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    waits = ONE | {"state": "waits", "status": None, "plan": None, "handoff": None, "failed_attempts": []}
    assert asked(waits, "trace", "req-1")[0] == Exit.OK
    assert capsys.readouterr().out.startswith("request req-1: is under way: it waits, 3131.7 ms\n")
    refused = waits | {"state": "ended", "status": 429, "error": "rate_limited", "attempts": 0}
    assert asked(refused, "trace", "req-1")[0] == Exit.OK
    assert capsys.readouterr().out.startswith("request req-1: 429 rate_limited, 3131.7 ms\n")


def test_what_the_worker_calls_it_is_told_where_its_answer_has_no_id(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for worker_id, line in (("req-2-3", "  the worker knows it as req-2-3\n"), ("req-1", ""), (None, "")):
        asked(ONE | {"answer_id": None, "worker_id": worker_id}, "trace", "req-1")
        out = capsys.readouterr().out
        assert line in out
        assert ("knows it as" in out, "its answer is called" in out) == (bool(line), False)


def test_one_worker_served_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"whole_reason": "disaggregation is off", "decode": ONE["plan"]["decode"]}
    assert asked(ONE | {"plan": plan, "handoff": None}, "trace", "req-1")[0] == Exit.OK
    out = capsys.readouterr().out
    assert "One worker was to do all of it, m/decode/0: disaggregation is off.\n" in out
    assert "m/decode/0 serves it: It has the fewest legs under way.\n" in out


def test_of_several_orchestrators_it_is_said_which_has_served_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/admin/requests/req-1"
    with admin_listener({}) as one, admin_listener({path: ONE}) as two:
        assert main(["trace", "req-1", "--admin", one.url, "--admin", two.url]) == Exit.OK
    assert "arrived 2026-11-30 13:49:39.635 UTC, at process 1 of orchestrator 1\n" in capsys.readouterr().out


def test_requests_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    failed = ONE | {"id": "x" * 60, "status": 502, "error": "worker_lost", "attempts": 1}
    document = {"requests": [ONE, failed], "unanswered": [2]}
    command = ["trace", "--slowest", "--failed", "--key", "a b", "--slower-than", "2", "--limit", "7"]
    code, paths = asked(document, *command, path="/admin/requests")
    query = "slowest=1&failed=1&key=a+b&slower_than=2&limit=7"
    assert (code, paths) == (Exit.OK, [f"/admin/requests?{query}"])
    assert capsys.readouterr().out.splitlines() == [
        "process 2 did not answer: its requests are missing",
        "time (UTC)           ms  status                      request id",
        "13:49:39.635     3131.7  200 in 2 attempts           req-1",
        "13:49:39.635     3131.7  502 worker_lost",
        f"    {'x' * 60}",
    ]


def test_a_list_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"requests": [], "unanswered": []}
    for options, line in (
        ((), "no request yet"),
        (("--slowest",), "no request yet"),
        (("--failed",), "no request of late is like that"),
        (("--slowest", "--key", "a"), "no request of late is like that"),
    ):
        assert asked(nothing, "trace", *options, path="/admin/requests")[0] == Exit.OK
        assert capsys.readouterr().out == f"{line}\n"


def test_as_json_it_is_what_the_orchestrator_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(hostile(ONE), "trace", "req-1", "-o", "json")[0] == Exit.OK
    assert json.loads(capsys.readouterr().out) == hostile(ONE)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_is_no_id(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(ONE, "trace", name) == (Exit.USAGE, [])
    assert capsys.readouterr().err == f"{name!r} is no request id\n"


@pytest.mark.parametrize(
    ("name", "path"),
    [("a/b?c#d", "a%2Fb%3Fc%23d"), (ESCAPES, "%1B%5B31m%0D%0Aforged%07%C3%A9%E2%80%AE"), ("\udcff", "%FF")],
)
def test_an_id_is_asked_for_as_it_is(name: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, paths = asked(ONE, "trace", name)
    assert (code, paths) == (Exit.FAILED, [f"/admin/requests/{path}"])
    assert capsys.readouterr().err.isascii()


@pytest.mark.parametrize(
    "given", [["--slower-than", "x"], ["--slower-than=-1"], ["--slower-than", "inf"], ["--limit", "x"]]
)
def test_what_is_no_number(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trace", *given])
    assert ended.value.code == Exit.USAGE
    assert f"argument {given[0].partition('=')[0]}: expected " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code"), [(400, Exit.USAGE), (401, Exit.FAILED), (404, Exit.FAILED), (500, Exit.FAILED)]
)
@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["events", "--kind", "nosuch"], "/admin/events"),
        (["events", "-f", "--after", "x"], "/admin/events"),
        (["trace", "--limit", "100000"], "/admin/requests"),
    ],
)
def test_a_query_that_is_not_understood_is_a_wrong_command_line(
    command: list[str], path: str, status: int, code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    with admin_listener({path: (status, {"error": {"message": "no such kind"}})}) as admin:
        assert main([*command, "--admin", admin.url]) == code
    assert "no such kind" in capsys.readouterr().err


def test_an_id_and_a_list_are_two_things(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(ONE, "trace", "req-1", "--failed") == (Exit.USAGE, [])
    assert "leave out what lists others" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [[], {"a": 1}, "text", (404, {"error": {"message": "no request 'x'"}})])
def test_what_is_no_answer(answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(answer, "trace", "req-1")[0] == Exit.FAILED
    assert asked(answer, "trace", path="/admin/requests")[0] == Exit.FAILED
    assert capsys.readouterr().out == ""


def test_it_finds_the_run_that_was_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with admin_listener({"/admin/requests/req-1": ONE, "/admin/events": []}) as admin:
        made_run(tmp_path, admin=admin.url)
        assert main(["trace", "req-1"]) == Exit.OK
        assert main(["events"]) == Exit.OK
    assert capsys.readouterr().out.startswith("request req-1")


# --- events -------------------------------------------------------------------------------------

GONE = {"number": 7, "time": 1796046579.5, "kind": "worker.gone", "message": "m/decode/0 is gone"}


def test_events_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    drained = GONE | {"kind": "admin.drain", "message": "m/d/0 was drained", "who": "key root", "process": 1}
    refused = GONE | {"kind": "request.rejected", "message": "2 requests were refused", "who": "key alice"}
    code, paths = asked(
        [GONE, drained, GONE | {"message": ESCAPES}, refused],
        *("events", "--kind", "worker", "--kind", "admin.drain", "--after", "6"),
        path="/admin/events",
    )
    assert (code, paths) == (Exit.OK, ["/admin/events?kind=worker&kind=admin.drain&after=6"])
    assert capsys.readouterr().out.splitlines() == [
        "2026-11-30T13:49:39.500Z worker.gone: m/decode/0 is gone",
        "2026-11-30T13:49:39.500Z admin.drain: m/d/0 was drained, by key root (process 1)",
        r"2026-11-30T13:49:39.500Z worker.gone: \x1b[31m\r\nforged\x07é\u202e",
        "2026-11-30T13:49:39.500Z request.rejected: 2 requests were refused, of key alice",
    ]


def test_events_are_objects_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked([GONE, GONE], "events", "-o", "json", path="/admin/events")[0] == Exit.OK
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [GONE, GONE]


def test_a_stream_is_taken_up_again_where_it_was_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(events, "AGAIN_S", 0.0)
    parts = [
        ": hello\n\nid: ab.7\ndata: " + json.dumps(GONE) + "\n\n",
        'id: ab.9\nevent: gap\ndata: {"missed":2}\n\n',
        (401, {"error": {"message": "no"}}),
    ]
    with admin_listener({"/admin/events": lambda: parts.pop(0)}) as admin:
        assert main(["events", "-f", "--after", "3", "--admin", admin.url]) == Exit.FAILED
        assert admin.paths("GET") == [
            f"/admin/events?after={after}&follow=1" for after in ("3", "ab.7", "ab.9")
        ]
    assert capsys.readouterr().out.splitlines() == [
        "2026-11-30T13:49:39.500Z worker.gone: m/decode/0 is gone",
        "(2 events are missing here: they were dropped before they could be read)",
    ]


def test_a_listener_that_is_not_there_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "-f", "--admin", "http://127.0.0.1:9"]) == Exit.FAILED
    assert "does not answer" in capsys.readouterr().err
