from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from orchestrator.wire.member import Member, write_member


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A pool each of a folder, and of a name."""
    path = tmp_path / "config.yaml"
    discover = {"file": str(tmp_path / "members")}
    pools = {"prefill": {"discover": discover}, "decode": {"discover": discover}}
    path.write_text(json.dumps({"models": [{"name": "m", **pools}]}))
    for name, more in (("a", {"zone": "z"}), ("b", {"is_draining": True}), ("c", {"is_ready": False})):
        member = Member(uid=f"u-{name}", name=name, model="m", role="decode", url=f"http://{name}:1", **more)  # type: ignore[arg-type]
        write_member(tmp_path / "members", member)
    return path


def test_the_members_of_each_source_are_shown(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["discover", str(config)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"file {config.parent / 'members'}: for m/prefill, m/decode"
    assert [row.split() for row in rows] == [
        ["WORKER", "STATE", "URL", "ZONE", "UID"],
        ["m/decode/a", "serves", "http://a:1", "z", "u-a"],
        ["m/decode/b", "drains", "http://b:1", "u-b"],
        ["m/decode/c", "not", "ready", "http://c:1", "u-c"],
    ]


def test_what_is_wrong_is_shown_and_is_a_failure(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "members/m%2Fdecode%2Fx.json").write_text("\x1b[31m")
    twin = Member(uid="u", name="twin", model="m", role="prefill", url="http://a:1")
    write_member(config.parent / "members", twin)
    assert main(["discover", str(config)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "wrong: " in line]
    assert wrong[0].startswith("  wrong: m%2Fdecode%2Fx.json: JSON is malformed")
    assert "it has the url 'http://a:1' of m/decode/a, which is used" in wrong[1]


def test_a_source_that_is_away_says_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = "models.0.prefill.discover={kubernetes: {service: s}}"
    assert main(["discover", str(config), "--set", override, "-o", "json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["name"] == "kubernetes s"
    assert "KUBERNETES_SERVICE_HOST is not set" in first["away"]
    assert [one["worker"] for one in second["members"]] == ["m/decode/a", "m/decode/b", "m/decode/c"]
    assert second["members"][0] == {
        "worker": "m/decode/a",
        "state": "serves",
        "url": "http://a:1",
        "zone": "z",
        "revision": None,
        "uid": "u-a",
    }


def test_a_config_without_a_source_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('models: [{name: m, both: {urls: ["http://h:1"]}}]')
    assert main(["discover", str(path)]) == 1
    assert "no pool says discover" in capsys.readouterr().err


def test_what_is_no_file_is_passed_over_and_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(config.parent / "members/f.json")
    assert main(["discover", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  wrong: f.json: it is passed over: Is a FIFO, not a file"
    assert len(lines) == 6


@pytest.mark.processes
def test_it_ends_though_a_file_system_does_not_answer(config: Path) -> None:
    code = """
import sys, time
from launch.cli import main
from orchestrator.discovery import file
file.look_again = lambda path, seen: time.sleep(3600)
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "discover", str(config), "--timeout-s", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot be asked: it has not answered in 0.1 s" in done.stdout
