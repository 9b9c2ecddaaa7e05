"""`baton scale CONFIG` says how many workers are wanted, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.exits import Exit
from launch.operate.wanted import PAGE
from tests.launch.runs import admin_listener, made_run


def wish(model: str, role: str, wanted: int, ready: int, **more: Any) -> dict[str, Any]:
    usual = {"model": model, "role": role, "wanted": wanted, "ready": ready, "starting": 0, "draining": 0}
    return {**usual, "why": "so it is", **more}


WISHES = [
    wish("a", "prefill", 3, 2, starting=1),
    wish("a", "decode", 2, 2, draining=1, why="66 seats\ntaken"),
    wish("b", "both", 1, 1),
]
TEXT = """\
a: 3:2 (prefill:decode)
  prefill: 3 wanted, 2 ready, 1 starting; so it is
  decode: 2 wanted, 2 ready, 1 draining; 66 seats\\ntaken
b: 1 (both)
  both: 1 wanted, 1 ready; so it is
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("BATON_ADMIN_KEY", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("")
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["scale", *words])
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_run_of_a_config_is_asked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with admin_listener({PAGE: WISHES}) as listener:
        made_run(Path.cwd(), admin=listener.url, config=config)
        assert said(capsys, config) == (Exit.OK, TEXT, "")
        code, out, _ = said(capsys, config, "-o", "json")
        assert (code, json.loads(out)) == (Exit.OK, WISHES)


def test_a_listener_anywhere_is_asked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with admin_listener({PAGE: WISHES}) as listener:
        assert said(capsys, config, "--admin", listener.url) == (Exit.OK, TEXT, "")
        assert listener.paths("GET") == [PAGE]


def test_several_orchestrators_are_asked_as_one(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [wish("b", "both", 2, 1, why="the other one has more")]
    with admin_listener({PAGE: [WISHES[2]]}) as one, admin_listener({PAGE: more}) as other:
        code, out, _ = said(capsys, config, "--admin", one.url, "--admin", other.url)
    assert code == Exit.OK
    assert out == "b: 2 (both)\n  both: 2 wanted, 1 ready; the other one has more\n"


def test_where_nothing_is_known(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with admin_listener({PAGE: []}) as listener:
        _, out, _ = said(capsys, config, "--admin", listener.url)
    assert out == "nothing is known yet: the orchestrator has just started\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nothing.yaml"], Exit.USAGE, "no file 'nothing.yaml'; for so many workers give MODEL/ROLE N"),
        (["sim/decode"], Exit.USAGE, "there is no file 'sim/decode'"),
        (["c.yaml", "--force"], Exit.USAGE, "without --config and --force"),
        (["c.yaml", "--config", "c.yaml"], Exit.USAGE, "without --config and --force"),
        (["c.yaml"], Exit.FAILED, "c.yaml"),  # which does not run
        (["c.yaml", "--admin", "ftp://x"], Exit.USAGE, "expected http://HOST:PORT"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], code: Exit, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, out, err = said(capsys, *words)
    assert (found, out) == (code, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"a": 1}, "answers as no admin listener of this version does"),
        ([{"model": "a"}], "answers as no admin listener of this version does"),
        ((404, {"error": {"message": "the config has no section `scaling`"}}), "no section `scaling`"),
        ((403, {"error": {"message": "not for you"}}), "not for you"),
    ],
)
def test_answers_of_another_kind(
    answer: Any, says: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with admin_listener({PAGE: answer}) as listener:
        code, out, err = said(capsys, config, "--admin", listener.url)
    assert (code, out) == (Exit.FAILED, "")
    assert says in err


def test_a_run_without_an_admin_listener(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(Path.cwd(), admin=None, config=config)
    code, _, err = said(capsys, config)
    assert code == Exit.FAILED
    assert "has no admin listener" in err
