from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from launch.cli import main
from launch.exits import Exit
from orchestrator.config.keys import REST, KeyLimits, KeyRing
from orchestrator.telemetry.counters import OTHER


def test_a_key_and_its_line_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "new", "alice", "--scope", "metrics"]) == Exit.OK
    key, line = capsys.readouterr().out.splitlines()
    assert line == f"alice {sha256(key.encode()).hexdigest()} metrics"


@pytest.mark.parametrize("scopes", [["--scope", "infer", "--scope", "admin"], ["--scope", "infer,admin"]])
def test_a_key_is_added_to_a_file(
    scopes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    for name, more in (("first", []), ("second", scopes)):
        assert main(["key", "new", name, *more, "--file", str(file)]) == Exit.OK
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    ring = KeyRing.load(file)
    assert ring.check(f"Bearer {first}".encode()) == "first"
    assert ring.check(f"Bearer {second}".encode(), scope="admin") == "second"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first not in file.read_text()
    reload = "it takes effect with a reload: kill -HUP of `baton up`, or POST /admin/reload"
    assert shown.err.splitlines()[0] == f"{file}: first was added; {reload}"


def test_a_key_may_have_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    limits = ["--rpm", "600", "--tpm", "0", "--concurrency", "8", "--weight", "2"]
    assert main(["key", "new", "alice", *limits, "--file", str(file)]) == Exit.OK
    assert file.read_text().endswith(" infer rpm=600 tpm=0 concurrency=8 weight=2\n")
    (key,) = KeyRing.load(file)
    assert key.limits == KeyLimits(rpm=600, tpm=0, concurrency=8, weight=2.0)


def test_a_last_line_without_its_end_is_ended_first(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# no line break")
    assert main(["key", "new", "alice", "--file", str(file)]) == Exit.OK
    assert file.read_text().startswith("# no line break\nalice ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a b"], "a name is 1 to 64 letters, digits and . _ -"),
        (["evil\nroot"], "a name is 1 to 64 letters, digits and . _ -"),
        (["a", "--scope", "root"], "scopes are infer, metrics, admin, with commas between them"),
        (
            ["a", "--rpm", "lots"],
            "rpm (requests per minute) is a whole number up to 1000000000000, 0 for no limit",
        ),
        (
            ["a", "--rpm", "99999999999999999999"],
            "rpm (requests per minute) is a whole number up to 1000000000000, 0 for no limit",
        ),
        (
            ["other"],
            "other is no name of a key: metrics count those that are beyond their number together as other",
        ),
        (["a", "--weight", "-1"], "weight is a number from 0.001 to 1000"),
        (["taken", "--file", "keys"], "keys has a key of the name taken already"),
        (
            ["a", "--file", "broken"],
            "broken:1: expected NAME SHA256HEX [SCOPE,...] [LIMIT=N ...], got 1 word",
        ),
        (["a", "--file", "no/such"], "cannot write no/such: No such file or directory"),
        (["a", "--file", "/dev/full"], "/dev/full is not a regular file"),
    ],
)
def test_what_makes_no_key(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text(f"taken {'0' * 64}\n")
    Path("broken").write_text("hush\n")
    before = Path("keys").read_text(), Path("broken").read_text()
    assert main(["key", "new", *arguments]) == Exit.USAGE
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{says}\n")
    assert (Path("keys").read_text(), Path("broken").read_text()) == before


def test_the_name_that_no_key_has_is_the_label_of_the_metrics() -> None:
    assert REST == OTHER


def test_on_a_full_disk_the_file_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {'0' * 64}\n")
    write = os.write
    monkeypatch.setattr("launch.keys.os.write", lambda descriptor, data: write(descriptor, data[:10]))
    assert main(["key", "new", "bob", "--file", str(file)]) == Exit.USAGE
    monkeypatch.undo()
    assert file.read_text() == f"alice {'0' * 64}\n"
    assert capsys.readouterr().err == f"cannot write {file}: No space left on device\n"


def test_check_says_what_nobody_can_do_with_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "keys", tmp_path / "c.yaml"
    config.write_text(
        f"orchestrator: {{api_keys_file: {file}, admin: '127.0.0.1:28001'}}\n"
        "models: [{name: m, both: {engine: sim}}]\n"
    )
    assert main(["key", "new", "alice", "--file", str(file)]) == Exit.OK
    capsys.readouterr()
    assert main(["check", str(config)]) == Exit.OK
    assert f"note: no key in {file} has the scope admin" in capsys.readouterr().err
    assert main(["key", "new", "root", "--scope", "admin", "--file", str(file)]) == Exit.OK
    capsys.readouterr()
    assert main(["check", str(config)]) == Exit.OK
    assert "note: no key" not in capsys.readouterr().err
