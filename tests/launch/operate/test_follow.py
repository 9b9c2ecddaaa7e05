"""Logs are printed from their end, and followed through their rotation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from launch import cli
from launch.exits import Exit
from launch.local.upkeep import rotate
from launch.operate.follow import MAX_LINE, _Log
from tests.launch.runs import entry, made_run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "one.log"
    path.write_bytes(b"")
    return path


def append(log: Path, content: bytes) -> None:
    with log.open("ab") as file:
        file.write(content)


def test_the_last_lines(log: Path) -> None:
    append(log, b"".join(b"%d\n" % number for number in range(10)))
    assert [*_Log(log).last(3)] == [b"7", b"8", b"9"]
    assert [*_Log(log).last(0)] == []
    assert len([*_Log(log).last(99)]) == 10


def test_the_last_lines_of_a_long_log(log: Path) -> None:
    append(log, b"".join(b"%0200d\n" % number for number in range(5000)))
    assert [int(line) for line in _Log(log).last(1000)] == [*range(4000, 5000)]


def test_lines_of_earlier_files_are_among_the_last(log: Path) -> None:
    for part in range(3):
        append(log, b"".join(b"%d\n" % (10 * part + number) for number in range(10)))
        if part < 2:
            rotate(log, 4)
    assert [int(line) for line in _Log(log).last(15)] == [*range(15, 30)]
    assert [int(line) for line in _Log(log).last(99)] == [*range(30)]


def test_what_comes_later(log: Path) -> None:
    append(log, b"one\nhal")
    found = _Log(log)
    assert [*found.last(9)] == [b"one"]
    append(log, b"f\n")
    assert [*found.more()] == [b"half"]
    append(log, b"end")
    assert [*found.more()] == []
    assert [*found.rest()] == [b"end"]


def test_nothing_is_lost_or_doubled_by_rotation(log: Path) -> None:
    chance = random.Random(7)
    found = _Log(log)
    assert [*found.last(9)] == []
    written = 0
    seen: list[int] = []
    for _ in range(300):
        match chance.choice(("write", "write", "rotate", "read")):
            case "write":
                for _ in range(chance.randrange(5)):
                    append(log, b"%d\n" % written)
                    written += 1
            case "rotate":
                seen += map(int, found.more())  # what is rotated twice between two looks is lost
                append(log, b"%d\n" % written)
                written += 1
                rotate(log, 2)
            case "read":
                seen += map(int, found.more())
    seen += map(int, found.more())
    assert seen == [*range(written)]


def test_a_log_that_somebody_empties(log: Path) -> None:
    append(log, b"one\n")
    found = _Log(log)
    assert [*found.last(9)] == [b"one"]
    log.write_bytes(b"")
    assert [*found.more()] == []
    append(log, b"two\n")
    assert [*found.more()] == [b"two"]


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    found = _Log(tmp_path / "later.log")
    assert [*found.last(9)] == []
    append(tmp_path / "later.log", b"one\n")
    assert [*found.more()] == [b"one"]


def test_a_line_without_end_comes_in_pieces(log: Path) -> None:
    found = _Log(log)
    append(log, b"x" * (3 * MAX_LINE))
    assert b"".join([*found.more(), *found.rest()]) == b"x" * (3 * MAX_LINE)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = made_run(tmp_path, ended=1.0, processes=[entry("m/both/0"), entry("orchestrator")])
    append(directory / "m-both-0.log", b"\x1b[32mgreen\x1b[0m \x1b]0;title\x07 \xff\r\n")
    append(directory / "orchestrator.log", b"1\n2\n3\n")
    return directory


@pytest.mark.usefixtures("run")
def test_no_line_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "m/both/0"]) == Exit.OK
    shown = capsys.readouterr()
    assert shown.out == "green \\x1b]0;title\\x07 \ufffd\n"
    assert "note: this run has ended" in shown.err


@pytest.mark.usefixtures("run")
def test_each_line_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "-n", "2"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["orchestrator | 2", "orchestrator | 3"]
    assert lines[0].startswith("m/both/0     | green")


@pytest.mark.usefixtures("run")
def test_a_run_that_has_ended_is_followed_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "-f", "orchestrator", "-o", "json"]) == Exit.OK
    shown = capsys.readouterr()
    assert [json.loads(line)["line"] for line in shown.out.splitlines()] == ["1", "2", "3"]
    assert "the run has ended" in shown.err


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("lines", ["-1", "x", "1e9", "9" * 20])
def test_a_number_of_lines(lines: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["logs", f"--lines={lines}"])
    assert caught.value.code == Exit.USAGE
    assert "expected a number of lines" in capsys.readouterr().err
