"""A frame is made of what the admin listener answers, and fits any terminal."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from launch import cli, remote
from launch.exits import Exit
from launch.local.run_state import FILE, read
from launch.operate.frame import make_frame, rates
from launch.operate.rows import ago, milliseconds
from launch.operate.screen import drawn
from launch.remote import Run
from tests.launch.runs import admin_listener, entry, made_run

METRICS = """\
# HELP baton_requests_total Requests.
# TYPE baton_requests_total counter
baton_requests_total{code="200",endpoint="chat",model="m"} 40.0
baton_requests_total{code="503",endpoint="chat",model="m"} 2.0
baton_requests_in_flight{model="m"} 3.0
baton_requests_rejected_total{reason="queue_full"} 5.0
baton_request_stage_seconds_bucket{le="0.1",model="m",stage="queue"} 7.0
baton_queue_requests{model="m"} 4.0
baton_kv_leases{state="pending"} 1.0
baton_key_requests_total{key="alice",code="200"} 7.0
baton_key_requests_total{key="alice",code="429"} 2.0
baton_key_tokens_total{key="bob"} 1e6
baton_worker_errors_total{worker="m/decode/0"} 1.0
"""


def worker(name: str = "m/decode/0", **more: Any) -> dict[str, Any]:
    model, role, _ = name.rsplit("/", 2)
    address = {"name": name, "model": model, "role": role, "url": f"http://h/{name}", "rank": None}
    values = {
        "state": "ready",
        "in_flight": 3,
        "is_drained": False,
        "last_error": None,
        "since": 1000.0,
        "seats": 8,
        "share": 1.0,
        "served": 100,
        "errors": 1,
        "retries": 2,
        "transfers": 99,
        "rate": 12.5,
        "first_byte_p50": 0.0123,
        "first_byte_p99": 0.2,
        "inter_token_p50": None,
        "inter_token_p99": None,
        "is_slow": False,
    }
    return {"address": address, **values, **more}


def lines(*workers: dict[str, Any], width: int = 120, height: int | None = None, **more: Any) -> list[str]:
    frame = make_frame(1090.0, None, workers, [], more.pop("metrics", METRICS))
    return [line.plain for line in drawn(frame, None, None, width, height, more.pop("problem", None))]


def test_a_frame_has_all_that_is_counted() -> None:
    frame = make_frame(1.0, None, [worker(), worker("m/prefill/0", rate=99.0)], [], METRICS)
    assert frame.rate == 12.5  # a request is counted once
    assert frame.totals == {"requests": 42, "rejected": 5, "in_flight": 3}
    assert frame.queue == {"m": 4}
    assert frame.leases == {"pending": 1}
    assert frame.keys == {"alice": {"requests": 9}, "bob": {"tokens": 1e6}}
    json.dumps(frame.document())


def test_rates_are_of_two_frames() -> None:
    before = make_frame(10.0, None, [], [], METRICS)
    after = make_frame(12.0, None, [], [], METRICS.replace("40.0", "60.0"))
    assert rates(after, before) == {"requests": 10.0, "rejected": 0.0}
    assert rates(before, None) == {}
    assert rates(make_frame(14.0, None, [], [], METRICS), after)["requests"] == 0.0  # it was started again


def test_a_wide_terminal_has_everything() -> None:
    shown = "\n".join(lines(worker()))
    for text in ("12.5 requests/s", "rejected 5", "queue m 4", "pending 1", "3/8", "12/200", "90s", "alice"):
        assert text in shown, text


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    shown = lines(worker(), worker("m/prefill/0"), worker(f"{'long' * 30}/decode/11"), width=width)
    assert max(map(cell_len, shown)) <= width
    assert any("ode/0" in line for line in shown)
    assert any("/11" in line for line in shown)  # the end of a name tells which one it is
    assert any("ready" in line for line in shown)


def test_eighty_columns_have_what_matters() -> None:
    title = next(line for line in lines(worker(), width=80) if line.startswith("WORKER"))
    for column in ("STATE", "SINCE", "SEATS", "REQ/S", "1ST BYTE MS", "TOKEN MS", "ERR"):
        assert column in title


def test_a_low_terminal_shows_what_is_not_well() -> None:
    many = [worker(f"m/decode/{index}") for index in range(50)]
    many[30]["state"], many[40]["is_slow"] = "ejected", True
    shown = lines(*many, height=14, metrics="")
    assert len(shown) <= 14
    assert any("m/decode/30" in line and "ejected" in line for line in shown)
    assert any("m/decode/40" in line and "ready slow" in line for line in shown)
    assert any(line.startswith("and 4") for line in shown)


HOSTILE = [
    "a\x1b[2J\x1b]0;title\x07b",
    "[red]markup[/red][link=http://x]",
    "line\nbreak\r\nand\ttab",
    "\u202eright to left",
    "模型" * 40,
    "e\u0301\u200b\U0001f525",
    "\udc80 lone",
    "x" * 100_000,
    "%s {0} :smile:",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_steers_the_terminal(name: str) -> None:
    hostile = worker(f"{name}/decode/0", state=name[:20], last_error=name)
    metrics = 'baton_key_requests_total{key="%s"} 1.0\nbaton_queue_requests{model="%s"} 2.0\n'
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    for width in (40, 80, 200):
        shown = lines(hostile, width=width, metrics=metrics % (escaped, escaped), problem=name)
        assert all(line.isprintable() or not line for line in (text.replace("\u200b", "") for text in shown))
        assert max(map(cell_len, shown)) <= width
    frame = make_frame(1.0, None, [hostile], [], metrics % (escaped, escaped))
    assert list(frame.keys) == [name]


def test_words() -> None:
    assert [ago(100.0 - back, 100.0) for back in (0, 60, 119, 120, 7200, 86400 * 3)] == [
        "0s", "60s", "119s", "2m", "2h", "3d"
    ]  # fmt: skip
    assert ago(None, 1.0) == ""
    assert milliseconds(0.0004, 1.0) == "0.4/1000"
    assert milliseconds(None, 1.0) == ""


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(remote.KEY_VARIABLE, raising=False)


ANSWERS: dict[str, Any] = {
    "/admin/workers": [worker(url="")],
    "/admin/processes": [{"index": 0, "pid": 7, "state": "serving", "in_flight": 3}],
    "/metrics": METRICS,
}


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("words", [["top"], ["top", "--once"], ["ps"]])
def test_a_run_with_a_worker_that_it_has_not_started(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with admin_listener(ANSWERS) as listener:
        made_run(tmp_path, admin=listener.url, processes=[entry("orchestrator"), entry("m/prefill/0")])
        assert cli.main(words) == Exit.OK
    shown = capsys.readouterr()
    assert shown.err == ""
    for name in ("orchestrator", "m/prefill/0", "m/decode/0"):
        assert name in shown.out
    assert "\x1b" not in shown.out


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("command", ["top", "ps"])
def test_json(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with admin_listener(ANSWERS) as listener:
        made_run(tmp_path, admin=listener.url)
        assert cli.main([command, "-o", "json"]) == Exit.OK
        document = json.loads(capsys.readouterr().out)
        assert document["run"]["admin"] == listener.url
        assert cli.main([command, "-o", "json", "--admin", listener.url]) == Exit.OK
        assert json.loads(capsys.readouterr().out)["run"] is None
    assert document["rows"][0]["name"] == "m/decode/0"
    assert document["rows"][0]["first_byte_p50"] == 0.0123
    assert document["data_processes"] == ANSWERS["/admin/processes"]


@pytest.mark.usefixtures("_apart")
def test_ps_without_an_answer_shows_the_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path, processes=[entry("m/prefill/0", state="died", pid=None, restarts=3)])
    assert cli.main(["ps"]) == Exit.OK
    shown = capsys.readouterr()
    assert "m/prefill/0  died" in shown.out
    assert "note: the admin listener http://127.0.0.1:1 does not answer" in shown.err
    assert cli.main(["top", "--once"]) == Exit.FAILED
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.usefixtures("_apart")
def test_ps_says_why_a_worker_does_not_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = worker(state="unfit", last_error="answers\x1b[2J 401")
    with admin_listener(ANSWERS | {"/admin/workers": [bad]}) as listener:
        made_run(tmp_path, admin=listener.url, operation="restart of m/decode/0, 1 of 2")
        assert cli.main(["ps"]) == Exit.OK
    out = capsys.readouterr().out
    assert "m/decode/0: answers\\x1b[2J 401" in out
    assert "restart of m/decode/0, 1 of 2" in out


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("answer", [[{"a": 1}], {"error": 1}, "<html>"])
def test_somebody_else_answers(answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with admin_listener(ANSWERS | {"/admin/workers": answer}) as listener:
        assert cli.main(["top", "--admin", listener.url]) == Exit.FAILED
        assert cli.main(["ps", "--admin", listener.url]) == Exit.FAILED
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_process_that_is_not_up_says_more_than_the_orchestrator(tmp_path: Path) -> None:
    directory = made_run(tmp_path, processes=[entry("m/decode/0", url="http://h", state="died", since=5.0)])
    run = Run(directory, read(directory / FILE))
    known = worker(state="gone")
    known["address"]["url"] = "http://h"
    (row,) = make_frame(time.time(), run, [known], [], "").rows
    assert (row["state"], row["since"], row["process_state"]) == ("died", 5.0, "died")
    assert (row["model"], row["errors"], row["pid"]) == ("m", 1, 4711)


def test_options_are_known_without_libraries() -> None:
    parser = cli._parser()
    arguments = parser.parse_args(["drain", "w", "--wait", "--timeout-s", "5", "--admin", "http://h:1"])
    assert isinstance(arguments, argparse.Namespace)
    assert (arguments.names, arguments.wait, arguments.timeout_s) == (["w"], True, 5.0)
