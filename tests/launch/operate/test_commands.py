"""Each command against a run with real processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from launch.cli import main
from launch.exits import Exit
from launch.local.run_state import FILE, read
from launch.remote import Run, asked
from tests.launch.operate.cluster import Cluster, loaded, running
from tests.launch.runs import admin_listener
from tests.orchestrator.certificate import CERT, KEY
from tests.waiting import is_running, wait_for, wait_until_gone

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(Cluster(tmp_path_factory.mktemp("cluster"), prefill=2, decode=2)) as made:
        yield made


WORKERS = {f"sim/{role}/{index}" for role in ("prefill", "decode") for index in (0, 1)}


def test_ps(cluster: Cluster) -> None:
    assert cluster.ask().status_code == 200
    document = cluster.json("ps")
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == WORKERS | {"orchestrator"}
    assert {row["state"] for row in rows.values()} == {"ready"}
    assert all(is_running(row["pid"]) for row in rows.values())
    assert rows["orchestrator"]["seats"] is None
    assert rows["sim/decode/0"]["seats"] == 1024
    assert (cluster.directory / document["run"]["directory"] / rows["sim/decode/0"]["log"]).exists()
    assert [process["state"] for process in document["data_processes"]] == ["serving"]
    shown = cluster.command("ps")
    assert shown.returncode == Exit.OK
    assert shown.stderr == ""
    head, titles, *lines = shown.stdout.splitlines()
    assert head.startswith(f"http://{cluster.listen}  up ")
    assert titles.split()[:3] == ["NAME", "STATE", "SINCE"]
    assert [line.split()[:2] for line in lines] == [[name, "ready"] for name in rows]


def test_names_for_shells(cluster: Cluster, tmp_path: Path) -> None:
    assert set(cluster.command("ps", "-o", "names").stdout.split()) == WORKERS | {"orchestrator"}
    shown = cluster.command("ps", "-o", "names", "--admin", cluster.admin, HOME=str(tmp_path))
    assert set(shown.stdout.split()) == WORKERS


def test_ps_by_the_url_of_the_admin_listener(cluster: Cluster, tmp_path: Path) -> None:
    cluster.env["HOME"] = str(tmp_path)
    document = cluster.json("ps", "--admin", cluster.admin)
    assert document["run"] is None
    assert {row["name"]: row["pid"] for row in document["rows"]} == dict.fromkeys(WORKERS)


def test_drain_and_undrain(cluster: Cluster) -> None:
    assert cluster.json("drain", "sim/decode/0", "--wait") == [
        {"name": "sim/decode/0", "state": "draining", "is_drained": True, "in_flight": 0}
    ]
    assert cluster.rows()["sim/decode/0"]["state"] == "draining"
    shown = cluster.command("drain", "sim/decode/1")
    assert shown.stdout == "sim/decode/1: draining, 0 requests\n"
    assert "no worker of sim/decode is left that serves" in shown.stderr
    assert cluster.command("undrain", "sim/decode/0", "sim/decode/1").returncode == Exit.OK
    wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")


@pytest.mark.parametrize(
    ("state", "said"),
    [("suspect", "suspect (it is probed now, and serves if that finds it well)"), ("ready", "ready")],
)
def test_undrain_says_what_comes_next(state: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = {"name": "m/decode/0", "model": "m", "role": "decode", "rank": None}
    row = {"address": address, "state": state, "is_drained": False, "in_flight": 0}
    answers = {"/admin/workers": [row], "/admin/workers/m/decode/0/undrain": row}
    with admin_listener(answers) as admin:
        assert main(["undrain", "m/decode/0", "--admin", admin.url]) == Exit.OK
    assert capsys.readouterr().out == f"m/decode/0: {said}, 0 requests\n"


def test_drain_waits_for_requests(cluster: Cluster) -> None:
    with loaded(cluster, clients=2):
        done = cluster.command("drain", "sim/decode/0", "--wait", "--timeout-s", "60")
        assert done.returncode == Exit.OK, done.stderr
        assert done.stdout == "sim/decode/0: draining, 0 requests\n"
        cluster.command("undrain", "sim/decode/0")
        wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")


@pytest.mark.parametrize("command", ["drain", "undrain", "restart"])
def test_a_name_that_there_is_not(cluster: Cluster, command: str) -> None:
    done = cluster.command(command, "sim/decod/0")
    assert done.returncode == Exit.FAILED
    assert done.stdout == ""
    assert "'sim/decod/0', did you mean 'sim/decode/0'?" in done.stderr


def test_logs(cluster: Cluster) -> None:
    one = cluster.command("logs", "sim/decode/0", "-n", "1")
    assert one.returncode == Exit.OK
    assert one.stdout.startswith("ready: http://127.0.0.1:")
    every = cluster.command("logs").stdout
    assert {line.partition(" | ")[0].strip() for line in every.splitlines()} == WORKERS | {"orchestrator"}
    lines = [json.loads(line) for line in cluster.command("logs", "-o", "json").stdout.splitlines()]
    assert {line["name"] for line in lines} == WORKERS | {"orchestrator"}
    assert "did you mean" in cluster.command("logs", "orchestrato").stderr


def test_logs_are_followed_until_ctrl_c(cluster: Cluster) -> None:
    following = cluster.popen("logs", "-f", "-n", "0")
    assert following.stdout is not None
    cluster.command("drain", "sim/decode/0")
    cluster.command("undrain", "sim/decode/0")
    seen = [following.stdout.readline()]
    while "was undrained" not in seen[-1]:
        seen.append(following.stdout.readline())
    assert any(line.startswith("orchestrator ") and "was drained" in line for line in seen)
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == Exit.INTERRUPTED
    assert err == ""
    wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")


def test_restart_one(cluster: Cluster) -> None:
    before = cluster.rows()["sim/decode/1"]
    assert cluster.json("restart", "sim/decode/1") == {"restarted": ["sim/decode/1"]}
    after = cluster.rows()["sim/decode/1"]
    assert after["pid"] != before["pid"]
    assert not is_running(before["pid"])
    assert (after["state"], after["restarts"]) == ("ready", before["restarts"] + 1)


def test_no_request_fails_while_all_workers_are_restarted(cluster: Cluster) -> None:
    before = {name: row["pid"] for name, row in cluster.rows().items()}
    with loaded(cluster) as load:
        done = cluster.command("restart", "--rolling")
        assert done.returncode == Exit.OK, done.stderr
    assert load.failures == []
    assert load.answered > 20
    assert load.streamed > 20
    after = cluster.rows()
    assert all(after[name]["pid"] != before[name] for name in WORKERS)
    assert after["orchestrator"]["pid"] == before["orchestrator"]
    assert {row["state"] for row in after.values()} == {"ready"}


def test_what_is_drained_stays_drained_over_a_restart(cluster: Cluster) -> None:
    cluster.command("drain", "sim/prefill/0")
    assert cluster.command("restart", "sim/prefill/0").returncode == Exit.OK
    row = cluster.rows()["sim/prefill/0"]
    assert (row["is_drained"], row["state"]) == (True, "draining")
    cluster.command("undrain", "sim/prefill/0")
    wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")


def test_scale_up_and_down_under_load(cluster: Cluster) -> None:
    with loaded(cluster) as load:
        up = cluster.json("scale", "sim/decode", "3")
        assert up == {
            "model": "sim",
            "role": "decode",
            "before": 2,
            "count": 3,
            "started": ["sim/decode/2"],
            "stopped": [],
        }
        row = cluster.rows()["sim/decode/2"]
        assert row["state"] == "ready"
        down = cluster.json("scale", "sim/decode", "2")
        assert down["stopped"] == ["sim/decode/2"]
        assert not is_running(row["pid"])
    assert load.failures == []
    assert set(cluster.rows()) == WORKERS | {"orchestrator"}
    assert set(cluster.workers()) == WORKERS


def test_what_was_scaled_outlasts_the_orchestrator(cluster: Cluster) -> None:
    cluster.json("scale", "sim/prefill", "3")
    cluster.json("scale", "sim/decode", "1")
    pid = cluster.rows()["orchestrator"]["pid"]
    os.kill(pid, signal.SIGKILL)
    expected = {f"sim/prefill/{index}" for index in range(3)} | {"sim/decode/0"}
    wait_for(lambda: _workers_or_none(cluster) == dict.fromkeys(expected, "ready"), "the same workers")
    assert cluster.rows()["orchestrator"]["restarts"] == 1
    cluster.json("scale", "sim/prefill", "2")
    cluster.json("scale", "sim/decode", "2")
    wait_for(lambda: _workers_or_none(cluster) == dict.fromkeys(WORKERS, "ready"), "those of the config")


def _workers_or_none(cluster: Cluster) -> dict[str, str] | None:
    try:
        return cluster.workers()
    except Exception:
        return None


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["scale", "sim/decod", "2"], Exit.FAILED, "did you mean 'sim/decode'?"),
        (["scale", "sim/decode", "0"], Exit.USAGE, "expected a number from 1 up"),
        (["scale", "sim/decode", "9" * 30], Exit.USAGE, "expected a number from 1 up"),
        (["scale", "sim/decode", "5000"], Exit.FAILED, "a pool has 1 to 1000 workers"),
        (["restart"], Exit.USAGE, "name the workers to restart, or all of them by --rolling"),
        (["restart", "--rolling", "sim/decode/0"], Exit.USAGE, "name the workers"),
        (["restart", "orchestrator"], Exit.FAILED, "--force restarts it all the same"),
        (["drain"], Exit.USAGE, "name the workers, as"),
        (["ps", "--admin", "ftp://x"], Exit.USAGE, "expected http://HOST:PORT"),
        (["down", "--admin", "http://x"], Exit.USAGE, "unrecognized arguments"),
    ],
)
def test_what_is_refused(cluster: Cluster, words: list[str], code: Exit, says: str) -> None:
    done = cluster.command(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_one_thing_at_a_time(cluster: Cluster) -> None:
    with begun(cluster, "restart", "--rolling") as first:
        assert "restart of sim/" in cluster.command("ps").stdout
        second = cluster.command("restart", "sim/prefill/0")
        assert second.returncode == Exit.FAILED, second.stderr
        assert "something else is under way: restart of sim/" in second.stderr
        first.communicate(timeout=100)
        assert first.returncode == Exit.OK


@contextmanager
def begun(cluster: Cluster, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command, and wait until it is under way."""
    with cluster.popen(*words) as process:
        try:
            wait_for(lambda: read(cluster.run / FILE).operation, "the beginning")
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_a_roll_after_the_worker_under_way(cluster: Cluster) -> None:
    with begun(cluster, "restart", "--rolling") as rolling:
        rolling.send_signal(signal.SIGINT)
        _, err = rolling.communicate(timeout=60)
        assert rolling.returncode == Exit.INTERRUPTED
        assert "Traceback" not in err
    wait_for(lambda: not read(cluster.run / FILE).operation, "its end")
    wait_for(lambda: cluster.workers() == dict.fromkeys(WORKERS, "ready"), "all to serve")


def test_nothing_stays_drained_if_the_orchestrator_dies_in_a_roll(cluster: Cluster) -> None:
    pid = cluster.rows()["orchestrator"]["pid"]
    with begun(cluster, "restart", "--rolling") as rolling:
        os.kill(pid, signal.SIGKILL)
        _, err = rolling.communicate(timeout=100)
        assert rolling.returncode in (Exit.OK, Exit.FAILED)
        assert "Traceback" not in err
    wait_for(lambda: _workers_or_none(cluster) == dict.fromkeys(WORKERS, "ready"), "all to serve")
    assert not any(row["is_drained"] for row in cluster.rows().values())


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_top_in_a_terminal_until_ctrl_c(cluster: Cluster, terminal: str) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {**cluster.env, "TERM": terminal}
    environ.pop("COLUMNS", None)
    top = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "top", "--interval-s", "0.1"],
        cwd=cluster.directory,
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    shown = b""
    while shown.count(b"sim/decode/1") < 3:  # frames
        shown += os.read(ours, 65536)
    top.send_signal(signal.SIGINT)
    with suppress(OSError):  # the other end was closed
        while piece := os.read(ours, 65536):
            shown += piece
    _, err = top.communicate(timeout=60)
    os.close(ours)
    assert (top.returncode, err) == (Exit.OK, b"")
    assert b"requests/s" in shown
    if terminal == "dumb":
        assert b"\x1b" not in shown
    else:
        assert b"\x1b[?1049h" in shown  # a screen of its own, which is left again
        assert b"\x1b[?1049l" in shown


# --- a cluster of its own ---------------------------------------------------------------------------


def test_the_only_worker_of_a_pool_is_replaced_first(tmp_path: Path) -> None:
    with running(Cluster(tmp_path)) as cluster:
        before = cluster.rows()
        with loaded(cluster) as load:
            done = cluster.command("restart", "--rolling")
            assert done.returncode == Exit.OK, done.stderr
        assert load.failures == []
        assert load.streamed > 20
        assert "sim/decode/1 serves in place of sim/decode/0 meanwhile" in done.stderr
        after = cluster.rows()
        assert set(after) == set(before)
        assert after["sim/decode/0"]["pid"] != before["sim/decode/0"]["pid"]


def test_a_killed_supervisor_is_recognized(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        assert cluster.up is not None
        cluster.up.kill()
        cluster.up.wait()
        for words in (
            ["ps"],
            ["drain", "sim/decode/0"],
            ["restart", "--rolling"],
            ["down"],
            ["top", "--once"],
        ):
            done = cluster.command(*words)
            assert done.returncode == Exit.FAILED, words
            assert f"(process {cluster.up.pid}, {cluster.config}), was killed" in done.stderr
        logs = cluster.command("logs", "sim/decode/0")
        assert logs.returncode == Exit.OK
        assert "note: this run has ended" in logs.stderr
        assert "ready: " in logs.stdout
    finally:
        cluster.stop()


def test_a_supervisor_that_is_killed_in_a_roll_leaves_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        pids = [row["pid"] for row in cluster.rows().values()]
        with begun(cluster, "restart", "--rolling") as rolling:
            assert cluster.up is not None
            cluster.up.kill()
            _, err = rolling.communicate(timeout=60)
            assert rolling.returncode == Exit.FAILED
            assert "has ended" in err
        wait_until_gone(pids)
        assert "was killed" in cluster.command("ps").stderr
        cluster.up.wait()
        assert cluster.up.stdout is not None
        cluster.up.stdout.close()
        cluster.start()  # a new one has nothing of it
        wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")
    finally:
        cluster.stop()


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    with running(Cluster(tmp_path)) as one, running(Cluster(tmp_path)) as two:
        done = one.command("ps")
        assert done.returncode == Exit.FAILED
        assert "2 runs are alive here" in done.stderr
        assert str(one.config) in done.stderr
        assert str(two.config) in done.stderr
        for which in (one, two):
            found = one.json("ps", "--config", which.config.name)["run"]
            assert found["config"] == str(which.config)
            assert one.json("ps", "--state", found["directory"])["run"] == found
        assert one.command("down", "--config", two.config.name).returncode == Exit.OK
        assert two.up is not None
        assert two.up.wait(timeout=60) == Exit.OK
        assert one.json("ps")["run"]["config"] == str(one.config)


def test_a_run_with_a_certificate(tmp_path: Path) -> None:
    with running(Cluster(tmp_path, tls={"cert": str(CERT), "key": str(KEY)})) as cluster:
        assert cluster.json("drain", "sim/decode/0")[0]["is_drained"]
        assert cluster.rows()["sim/decode/0"]["state"] == "draining"
        assert cluster.json("scale", "sim/decode", "2")["started"] == ["sim/decode/1"]


def test_down(tmp_path: Path) -> None:
    with running(Cluster(tmp_path)) as cluster:
        rows = cluster.rows()
        done = cluster.json("down")
        assert cluster.up is not None
        assert done["pid"] == cluster.up.pid
        assert cluster.up.wait(timeout=60) == Exit.OK
        assert not any(is_running(row["pid"]) for row in rows.values())
        again = cluster.command("down")
        assert again.returncode == Exit.FAILED
        assert "was stopped" in again.stderr


def test_keys_are_not_needed_by_who_has_started_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"client {'0' * 64} infer\n")
    with running(Cluster(tmp_path, api_keys_file="keys"), BATON_WORKER_API_KEY="hush") as cluster:
        assert cluster.json("scale", "sim/decode", "2")["started"] == ["sim/decode/1"]
        assert cluster.rows()["sim/decode/1"]["state"] == "ready"  # it got the workers' credential
        assert cluster.command("drain", "sim/decode/1").returncode == Exit.OK
        far = cluster.command("ps", "--admin", cluster.admin)
        assert far.returncode == Exit.FAILED
        assert "put a key with the scope admin into BATON_ADMIN_KEY" in far.stderr
        wrong = cluster.command("ps", "--admin", cluster.admin, BATON_ADMIN_KEY="wrong")
        assert wrong.returncode == Exit.FAILED
        with asked(Run(cluster.run, read(cluster.run / FILE)), {"command": "key"}) as answers:
            key = next(answers)["key"]
        assert cluster.command("ps", "--admin", cluster.admin, BATON_ADMIN_KEY=key).returncode == Exit.OK
        for file in cluster.run.glob("*.*"):
            assert key not in file.read_text()
        assert cluster.command("plan", str(cluster.config)).stdout.count("BATON_RUN_KEY") == 0
        mode = (cluster.run / "control").stat().st_mode
        assert mode & 0o077 == 0


def test_a_worker_that_does_not_start_is_taken_away_again(tmp_path: Path) -> None:
    with running(Cluster(tmp_path)) as cluster:
        os.mkdir(cluster.run / "sim-decode-1.log")  # where its log would be
        done = cluster.command("scale", "sim/decode", "2")
        assert done.returncode == Exit.FAILED
        assert "sim/decode/1 cannot be started" in done.stderr
        wait_for(lambda: set(cluster.workers()) == {"sim/prefill/0", "sim/decode/0"}, "it to be gone")
        assert set(cluster.rows()) == {"sim/prefill/0", "sim/decode/0", "orchestrator"}


def test_streams_that_do_not_end_keep_their_worker(tmp_path: Path) -> None:
    with running(Cluster(tmp_path, decode=2)) as cluster, loaded(cluster, clients=2) as load:
        slow = cluster.popen("restart", "sim/decode/0", "--timeout-s", "0.001")
        _, err = slow.communicate(timeout=100)
        if slow.returncode == Exit.FAILED:  # else nobody was there just then
            assert "sim/decode/0 still serves" in err
            assert "--force cuts them" in err
            wait_for(lambda: set(cluster.workers().values()) == {"ready"}, "all to serve")
    assert load.failures == []
