from __future__ import annotations

import json
import math
from typing import Any

import pytest

from bench.compare import wrk
from bench.shared.processes import Failed

ERRORS = {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0}


def output(**changes: Any) -> str:
    line = {"requests": 8000, "duration_us": 2_000_000, "p50_us": 1500, "p99_us": 4250, "errors": ERRORS}
    return f"Running 2s test\n  1 threads and 32 connections\n{json.dumps(line | changes)}\n"


def test_result_is_read_from_the_line_of_our_script() -> None:
    assert wrk.parse(output()) == wrk.Load(requests=8000, seconds=2.0, p50_ms=1.5, p99_ms=4.25)


def test_any_error_fails_the_load_and_is_named() -> None:
    with pytest.raises(Failed, match=r"^2 read errors, 7 status errors, of 8000 requests$"):
        wrk.parse(output(errors=ERRORS | {"status": 7, "read": 2}))


def test_without_an_answer_there_is_no_latency() -> None:
    load = wrk.parse(output(requests=0, p50_us=0, p99_us=0))
    assert math.isnan(load.p50_ms)
    assert math.isnan(load.p99_ms)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "wrk: (no output)"),
        ("unable to connect to 127.0.0.1:1 Connection refused\n", "wrk: unable to connect"),
    ],
)
def test_output_without_a_result_is_the_reason(said: str, reason: str) -> None:
    with pytest.raises(Failed) as failed:
        wrk.parse(said)
    assert str(failed.value).startswith(reason)


def test_missing_wrk_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert wrk.lacks() == "wrk is not installed (Debian: apt-get install wrk)"
