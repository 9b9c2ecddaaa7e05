from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.backends.slurm.report import TaskReport, age_of, read_report, uid_of, write_report
from orchestrator.wire.member import Member, write_member

REPORT = TaskReport(incarnation="7.0.0", state="ended", starts=2, code=-9, node="n1")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_report(tmp_path, "a/b", "decode", "0") is None
    write_report(tmp_path, "a/b", "decode", "0", REPORT)
    assert read_report(tmp_path, "a/b", "decode", "0") == REPORT
    assert read_report(tmp_path, "a/b", "prefill", "0") is None
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["a%2Fb%2Fdecode%2F0.json"]


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"state": "asleep"}', b"\xff"])
def test_a_report_that_is_garbage_is_none(tmp_path: Path, garbage: bytes) -> None:
    write_report(tmp_path, "m", "decode", "0", REPORT)
    next((tmp_path / "tasks").iterdir()).write_bytes(garbage)
    assert read_report(tmp_path, "m", "decode", "0") is None


def test_later_starts_are_known_by_their_uid() -> None:
    starts = ["a-pod", "7.1.0.1", "7.1.0.2", "7.1.1.1", "7.1.10.1", "12.1.0.1"]
    assert sorted(starts, key=age_of) == starts


def test_whose_start_a_members_file_is(tmp_path: Path) -> None:
    member = Member(uid="7.0.0.1", name="0", model="m", role="decode", url="http://10.0.0.1:1")
    assert uid_of(tmp_path, member) == ""
    write_member(tmp_path, member)
    assert uid_of(tmp_path, member) == "7.0.0.1"
    next(tmp_path.iterdir()).write_text("garbage")
    assert uid_of(tmp_path, member) == ""


def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    member = Member(uid="7.0.0.1", name="0", model="m", role="decode", url="http://10.0.0.1:1")
    write_report(tmp_path, "m", "decode", "0", REPORT)
    write_member(tmp_path, member)
    for path in (*tmp_path.glob("*.json"), *(tmp_path / "tasks").iterdir()):
        path.unlink()
        os.mkfifo(path)
    assert uid_of(tmp_path, member) == ""
    assert read_report(tmp_path, "m", "decode", "0") is None
