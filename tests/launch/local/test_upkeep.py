from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.local import upkeep
from launch.local.logs import make_run_directory
from launch.local.member import _because
from launch.local.upkeep import LOOK_S, WORKERS_FILE, Upkeep, prune, rotate


class Said:
    """A progress that keeps what it is to say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_log_that_is_too_large_is_rotated_while_it_is_written(tmp_path: Path) -> None:
    log, said = tmp_path / "w.log", Said()
    with log.open("ab", buffering=0) as writer:
        keeper = Upkeep([log], 100, 2, said)  # type: ignore[arg-type]
        for number in range(4):
            writer.write(b"%d" % number * 100 + b"\n")
            keeper.tend(number * LOOK_S)
        writer.write(b"last\n")
    assert log.read_bytes() == b"last\n"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["w.log", "w.log.1", "w.log.2"]
    assert (tmp_path / "w.log.1").read_bytes() == b"3" * 100 + b"\n"
    assert (tmp_path / "w.log.2").read_bytes() == b"2" * 100 + b"\n"
    assert said.lines == []


def test_without_a_limit_it_grows_on(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_bytes(b"x" * 1000)
    Upkeep([log], 0, 2, Said()).tend(0.0)  # type: ignore[arg-type]
    assert log.stat().st_size == 1000


def test_no_earlier_logs_are_kept_if_none_are_wanted(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_bytes(b"x" * 1000)
    rotate(log, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["w.log"]
    assert log.stat().st_size == 0


def test_what_cannot_be_copied_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, said = tmp_path / "w.log", Said()
    log.write_bytes(b"x" * 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upkeep, "_copy", full)
    Upkeep([log], 100, 2, said).tend(0.0)  # type: ignore[arg-type]
    assert log.stat().st_size == 1000
    assert said.lines[0] == f"{log} cannot be rotated: No space left on device"


def test_a_full_disk_is_said_by_name_once_and_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, free = Said(), iter((1e9, 100.0, 100.0, 1e9, 1e9))
    monkeypatch.setattr(upkeep, "free_bytes", lambda folder: next(free))
    keeper = Upkeep([tmp_path / "w.log"], 0, 0, said)  # type: ignore[arg-type]
    for number in range(5):
        keeper.tend(number * LOOK_S)
    assert said.lines == [
        f"no space is left on the disk of {tmp_path}, where the logs go: lines of the logs are lost until "
        "there is",
        f"there is space again on the disk of {tmp_path}, where the logs go",
    ]


def test_a_process_that_could_not_even_write_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.member.free_bytes", lambda folder: 0)
    said = _because([], 1, tmp_path / "w.log")
    assert said == f"\nlikely cause: no space is left on the disk of {tmp_path}, where the logs go"


def test_old_runs_are_removed(tmp_path: Path) -> None:
    runs = [tmp_path / f"run-20260101-00000{number}-{2**22 + number}" for number in range(6)]
    others = [tmp_path / "mine", tmp_path / "run-x"]
    for folder in (*runs, *others):
        folder.mkdir()
        (folder / "w.log").write_bytes(b"x" * 1000)
    prune(runs[5], 3, 10_000)
    assert [run.exists() for run in runs] == [False, False, False, True, True, True]
    assert all(other.exists() for other in others)
    prune(runs[5], 3, 1500)
    assert [run.exists() for run in runs[3:]] == [False, True, True]


def test_a_run_that_goes_on_keeps_its_logs(tmp_path: Path) -> None:
    running = tmp_path / f"run-20260101-000000-{os.getpid()}"
    elsewhere = tmp_path / f"run-20260101-000000-{2**22 + 1}"
    latest = tmp_path / "run-20260101-000001-1"
    for folder in (running, elsewhere, latest):
        folder.mkdir()
    (elsewhere / WORKERS_FILE).touch()
    prune(latest, 1, 0)
    assert running.exists()
    assert elsewhere.exists()
    (elsewhere / WORKERS_FILE).unlink()
    prune(latest, 1, 0)
    assert not elsewhere.exists()


def test_both_directories_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    for name in ("cwd", "state"):
        (tmp_path / name).write_text("a file")
    with pytest.raises(OSError, match="Not a directory") as caught:
        make_run_directory({"XDG_STATE_HOME": str(tmp_path / "state")}, tmp_path / "cwd")
    assert str(caught.value) == (
        f"{tmp_path}/cwd/.baton: Not a directory; {tmp_path}/state/baton: Not a directory"
    )
