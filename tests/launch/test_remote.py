"""Commands find the run that is meant, or say why there is none."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from launch import remote
from launch.exits import Exit
from launch.remote import Failed, Mistaken, Refused
from tests.launch.runs import admin_listener, entry, made_run


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    remote.add_options(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(remote.KEY_VARIABLE, raising=False)


def test_the_run_of_this_directory(tmp_path: Path) -> None:
    directory = made_run(tmp_path)
    assert remote.find_run(parsed()).directory == directory


def test_the_run_of_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = made_run(tmp_path)
    (tmp_path / "configs" / "more").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "configs" / "more")
    assert remote.find_run(parsed()).directory == directory


def test_the_nearest_run_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path)
    nearer = made_run(tmp_path / "below")
    monkeypatch.chdir(tmp_path / "below")
    assert remote.find_run(parsed()).directory == nearer


def test_the_run_whose_directory_could_not_be_written(tmp_path: Path) -> None:
    directory = made_run(tmp_path)
    (tmp_path / "state").mkdir()
    moved = (tmp_path / ".baton").rename(tmp_path / "state" / "baton")
    assert remote.find_run(parsed()).directory == moved / directory.name


def test_a_run_is_found_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path, "run-1", config=str(tmp_path / "a.yaml"))
    wanted = made_run(tmp_path, "run-2", config=str(tmp_path / "b.yaml"))
    assert remote.find_run(parsed("--config", "b.yaml")).directory == wanted
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert remote.find_run(parsed("--config", "../b.yaml")).directory == wanted
    with pytest.raises(Failed, match=r"no run of c\.yaml of `baton up` was found"):
        remote.find_run(parsed("--config", "c.yaml"))


def test_of_two_runs_one_must_be_named(tmp_path: Path) -> None:
    one, two = (made_run(tmp_path, f"run-{number}") for number in (1, 2))
    with pytest.raises(Failed, match="2 runs are alive here") as caught:
        remote.find_run(parsed())
    assert f"--state {one}" in str(caught.value)
    assert f"--state {two}" in str(caught.value)
    assert remote.find_run(parsed("--state", str(two))).directory == two
    assert remote.find_run(parsed("--state", str(two / "state.json"))).directory == two


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"ended": 1.0}, "was stopped"),
        ({"pid": 2**22 + 1}, "was killed"),
        ({"start": "another boot:1"}, "was killed"),  # the number was given to another process since
        ({"host": "another-machine"}, "is on another machine, another-machine"),
    ],
)
def test_a_run_that_is_over(tmp_path: Path, more: dict[str, object], says: str) -> None:
    directory = made_run(tmp_path, **more)
    with pytest.raises(Failed, match="nothing runs: the last run") as caught:
        remote.find_run(parsed())
    assert says in str(caught.value)
    assert str(directory) in str(caught.value)
    with pytest.raises(Failed, match=says):
        remote.find_run(parsed("--state", str(directory)))
    assert remote.find_run(parsed(), ended_too=True).directory == directory


def test_a_live_run_beside_one_that_is_over(tmp_path: Path) -> None:
    made_run(tmp_path, "run-1", ended=1.0)
    alive = made_run(tmp_path, "run-2")
    assert remote.find_run(parsed()).directory == alive
    assert remote.find_run(parsed(), ended_too=True).directory == alive


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(Failed) as caught:
        remote.find_run(parsed())
    assert f"no run of `baton up` was found in .baton of {tmp_path} or its parents" in str(caught.value)
    assert "--admin URL" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b"[" * 1000, b'{"version": 99}'])
def test_a_file_that_is_no_state_is_named(tmp_path: Path, content: bytes) -> None:
    directory = made_run(tmp_path)
    (directory / "state.json").write_bytes(content)
    with pytest.raises(Failed, match="is not a state of `baton up`"):
        remote.find_run(parsed())
    with pytest.raises(Failed, match="is not a state of `baton up`"):
        remote.find_run(parsed("--state", str(directory)))


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"no run has the directory nowhere: nowhere/state\.json: No such"):
        remote.find_run(parsed("--state", "nowhere"))


def test_a_run_of_another_user_is_used_only_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made_run(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(Failed, match="belongs to another user"):
        remote.find_run(parsed())
    assert remote.find_run(parsed("--state", str(directory))).directory == directory


# --- the admin listener ---------------------------------------------------------------------------


def test_the_admin_listener_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with admin_listener({"/admin/workers": [1], "/metrics": "text\n"}) as listener:
        made_run(tmp_path, admin=listener.url)
        with remote.connect(parsed()) as admin:
            assert admin.get("/admin/workers", {"a": 1}) == [1]
            assert admin.text("/metrics") == "text\n"
        monkeypatch.setenv(remote.KEY_VARIABLE, " secret\n")
        with remote.connect(parsed("--admin", listener.url.removeprefix("http://"))) as admin:
            assert admin.get("/admin/workers") == [1]
            with pytest.raises(Refused, match="404: no such path"):
                admin.post("/admin/nothing", {"a": "b"})
            with pytest.raises(Refused):
                admin.delete("/admin/nothing")
    assert "authorization" not in listener.asked[0][2]
    assert listener.asked[0][1] == "/admin/workers?a=1"
    assert listener.asked[-2][2]["authorization"] == "Bearer secret"
    assert listener.asked[-2][3] == b'{"a":"b"}'


def test_lines_are_followed() -> None:
    with (
        admin_listener(
            {"/admin/events": "one\ntwo\n", "/admin/no": (403, {"error": {"message": "no"}})}
        ) as listener,
        remote.connect(parsed("--admin", listener.url)) as admin,
    ):
        with admin.lines("/admin/events") as lines:
            assert [*lines] == ["one", "two"]
        with pytest.raises(Refused, match="403: no"), admin.lines("/admin/no"):
            pass


@pytest.mark.parametrize(
    ("status", "key", "says"),
    [
        (401, None, "put a key with the scope admin into BATON_ADMIN_KEY"),
        (403, "k", "BATON_ADMIN_KEY must hold a key with the scope admin"),
        (500, None, "500: why"),
    ],
)
def test_what_is_refused_says_what_is_missing(
    status: int, key: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv(remote.KEY_VARIABLE, key)
    with (
        admin_listener({"/admin/workers": (status, {"error": {"message": "why"}})}) as listener,
        remote.connect(parsed("--admin", listener.url)) as admin,
        pytest.raises(Refused) as caught,
    ):
        admin.get("/admin/workers")
    assert says in str(caught.value)
    assert "why" in str(caught.value)


def test_somebody_else_listens_there() -> None:
    with (
        admin_listener({"/a": "<html>", "/b": (500, "<html>")}) as listener,
        remote.connect(parsed("--admin", listener.url)) as admin,
    ):
        with pytest.raises(Failed, match="is no admin listener of Baton"):
            admin.get("/a")
        with pytest.raises(Failed, match="is this the admin listener"):
            admin.get("/b")


def test_nobody_listens_there(tmp_path: Path) -> None:
    directory = made_run(tmp_path, processes=[entry("orchestrator")])
    with remote.connect(parsed()) as admin, pytest.raises(Failed, match="does not answer") as caught:
        admin.get("/admin/workers")
    assert f"the orchestrator's log may say why: {directory / 'orchestrator.log'}" in str(caught.value)


def test_a_run_without_an_admin_listener(tmp_path: Path) -> None:
    made_run(tmp_path, admin=None)
    with pytest.raises(Failed, match=r"has no admin listener: give its config one \(orchestrator\.admin\)"):
        remote.connect(parsed())


@pytest.mark.parametrize(
    "words",
    [
        ["--admin", "ftp://h:1"],
        ["--admin", "http://"],
        ["--admin", "http://h:x"],
        ["--admin", "http://a b:1"],
        ["--admin", "http://h:1", "--state", "d"],
        ["--admin", "http://h:1", "--config", "c"],
    ],
)
def test_a_wrong_command_line(words: list[str]) -> None:
    with pytest.raises(Mistaken):
        remote.connect(parsed(*words))


def test_a_key_that_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.KEY_VARIABLE, "a b")
    with pytest.raises(Mistaken, match="BATON_ADMIN_KEY holds a blank"):
        remote.connect(parsed("--admin", "http://127.0.0.1:1"))


# --- words ----------------------------------------------------------------------------------------


def test_the_nearest_name() -> None:
    names = ["sim/prefill/0", "sim/decode/0"]
    assert remote.unknown("worker", "sim/decod/0", names) == (
        "no worker 'sim/decod/0', did you mean 'sim/decode/0'? there is sim/prefill/0, sim/decode/0"
    )
    assert remote.unknown("worker", "x", []) == "no worker 'x'; there is none"
    assert remote.unknown("worker", "x", ["w"] * 50).endswith(" and 30 more")


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(error: Exception) -> int:
        raise error

    def run(error: Exception) -> int:
        return remote.command(lambda arguments: refuse(error))(parsed())

    assert run(Mistaken("wrong\x1b[2J")) == Exit.USAGE
    assert run(Failed("refused\nBearer sk-12345678")) == Exit.FAILED
    assert capsys.readouterr().err == "wrong\\x1b[2J\nrefused\nBearer ***\n"


def test_names_stand_in_paths() -> None:
    assert remote.worker_path("a b?/decode/0", "drain") == "/admin/workers/a%20b%3F/decode/0/drain"
