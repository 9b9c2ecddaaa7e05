from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.arguments import Parser, commands_of
from launch.cli import _parser, main
from launch.exits import Exit

BAD = "models: [{name: m, both: {engine: vlm}}]\nbase_prt: 1\n"
GOOD = "models: [{name: m, both: {engine: sim}}]\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    return path


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [["check"], ["plan"], ["up"], ["up", "--dry-run"], ["orchestrator"], ["worker"]],
    ids=" ".join,
)
def test_every_command_refuses_a_wrong_config(
    command: Sequence[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(BAD)
    name = ["m/both/0"] if command == ["worker"] else []
    assert main([*command, "c.yaml", *name]) == Exit.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "c.yaml:1:27: engine: 'vlm' is not possible, did you mean 'vllm'? (allowed: vllm, sim)\n"
        "c.yaml:2:1: unknown key 'base_prt', did you mean 'base_port'?\n"
    )


@pytest.mark.usefixtures("config")
def test_a_wrong_override(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "c.yaml", "--set", "models.0.both.replicas=x"]) == Exit.USAGE
    expected = "--set models.0.both.replicas: replicas: expected a whole number, got 'x'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.processes
def test_as_a_process_there_is_no_traceback(config: Path) -> None:
    config.write_bytes(b"models: [\xff")
    done = baton("check", str(config))
    assert done.returncode == Exit.USAGE
    assert done.stderr == f"{config}:1:10: not UTF-8\n"


def test_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "no-such.yaml"]) == Exit.USAGE
    assert capsys.readouterr().err == "no-such.yaml: No such file or directory\n"


@pytest.mark.usefixtures("config")
def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "c.yaml"]) == Exit.OK
    assert capsys.readouterr().out == "c.yaml: right; models: m\n"


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("BATON_TRANSPORT", "smoke", "must be one of json, orjson, msgpack, not 'smoke'"),
        ("BATON_STREAMS", "spdy", "must be one of http, mux, not 'spdy'"),
        ("BATON_NIXL_PROGRESS_DELAY_US", "1ms", "must be a number from 0 to 1000000, not '1ms'"),
        ("BATON_NIXL_PROGRESS_DELAY_US", "9999999", "must be a number from 0 to 1000000, not '9999999'"),
    ],
)
def test_the_environment_is_looked_at(
    command: str,
    name: str,
    value: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert main([command, "c.yaml"]) == Exit.USAGE
    assert f"{name} {says}" in capsys.readouterr().err
    monkeypatch.setenv(name, "")
    assert main([command, "c.yaml"]) == Exit.OK


@pytest.mark.usefixtures("config")
def test_a_dry_run_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--dry-run", "c.yaml", "--set", "base_port=4000"]) == Exit.OK
    dry = capsys.readouterr().out
    assert main(["plan", "c.yaml", "--set", "base_port=4000"]) == Exit.OK
    assert capsys.readouterr().out == dry
    assert "# m/both/0" in dry
    assert "--port 4000" in dry
    assert "-m launch.cli orchestrator c.yaml \\\n  --set base_port=4000" in dry


@pytest.mark.usefixtures("config")
def test_what_cannot_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "c.yaml", "--set", "orchestrator.listen=127.0.0.1:0"]) == Exit.USAGE
    assert capsys.readouterr().err.startswith("c.yaml: orchestrator.listen has port 0")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == Exit.OK
    assert "models" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.usefixtures("config")
def test_a_worker_that_is_not_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "c.yaml", "m/decode/0"]) == Exit.USAGE
    assert capsys.readouterr().err == "c.yaml: no worker 'm/decode/0'; there are:\n  m/both/0\n"


@pytest.mark.usefixtures("config")
def test_a_worker_takes_the_place_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("os.execvpe", lambda *arguments: seen.extend(arguments))
    monkeypatch.setenv("BATON_TRANSPORT", "msgpack")
    main(["worker", "c.yaml", "m/both/0", "--set", "models.0.both.env.A=b"])
    program, argv, env = seen
    assert program == sys.executable
    assert isinstance(argv, tuple)
    assert argv[1:3] == ("-m", "worker.sim")
    assert isinstance(env, dict)
    assert (env["A"], env["BATON_TRANSPORT"]) == ("b", "msgpack")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check"], ["check", "c.yaml", "--st", "a=b"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == Exit.USAGE
    assert "usage: baton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["chek", "c.yaml"], "check"),
        (["docter", "c.yaml"], "doctor"),
        (["doctor", "c.yaml", "--statik"], "--static"),
        (["up", "c.yaml", "--dryrun"], "--dry-run"),
        (["bench", "--profile=ful", "http://127.0.0.1:1"], "full"),
    ],
)
def test_the_nearest_word_is_named(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == Exit.USAGE
    assert capsys.readouterr().err.endswith(f", did you mean {meant!r}?\n")


@pytest.mark.parametrize("arguments", [["xyzzy"], ["check", "c.yaml", "--zzz"]])
def test_what_is_near_to_nothing_gets_no_hint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "did you mean" not in capsys.readouterr().err


def test_help_has_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if re.match(r"  [a-z]", line)]
    assert sorted(listed) == sorted(commands_of(_parser()))
    assert "\nmore:" not in shown  # each is in a group


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{code.value:3}  {code.meaning}" in shown for code in Exit)


@pytest.mark.processes
def test_help_needs_no_library() -> None:
    """That is what makes it fast."""
    code = (
        "import sys, launch.cli\n"
        "try: launch.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = 'pydantic', 'httpx', 'yaml', 'asyncio', 'rich', 'msgspec'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.processes
def test_a_reader_that_leaves_early() -> None:
    command = f"{sys.executable} -m launch.cli schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == ""


@pytest.mark.processes
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["schema", "check c.yaml", "plan c.yaml", "metrics dashboard"])
def test_a_full_disk_is_named(config: Path, command: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == Exit.FAILED
    assert done.stderr == "baton: the output cannot be written: No space left on device\n"


def test_a_fault_that_names_a_file_is_not_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Parser:
        raise OSError(errno.ENOSPC, "No space left on device", "some.file")

    monkeypatch.setattr("launch.cli._parser", refuse)
    with pytest.raises(OSError, match=r"some\.file"):
        main([])


@pytest.mark.processes
def test_the_orchestrator_says_why_it_cannot_start(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "orchestrator", str(config)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"BATON_TRANSPORT": "smoke"},
    )
    assert done.returncode == Exit.FAILED
    assert done.stderr.startswith("BATON_TRANSPORT must be one of")
    assert "Traceback" not in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("command", ["orchestrator", "up", "plan"])
def test_a_workers_key_that_can_be_none_is_named_in_one_line(config: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", command, str(config)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"BATON_WORKER_API_KEY": "hush\x1b\nhush"},
    )
    assert done.returncode == Exit.USAGE
    assert len(done.stderr.splitlines()) == 1
    assert "BATON_WORKER_API_KEY holds" in done.stderr
    assert "hush" not in done.stderr
