"""Real processes, real signals: what starts must be ready, and nothing may be left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.shared.processes import free_port
from launch.exits import Exit
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
STANDIN = str(Path(__file__).parents[1] / "standin.py")
QUICK = {"first_delay_s": 0.1, "stop_worker_s": 30, "stop_orchestrator_s": 30}


@dataclass
class Cluster:
    """A driver process with its stand-ins; `options` are theirs by name, the last one is the orchestrator."""

    directory: Path
    options: dict[str, Sequence[str]]
    limits: dict[str, Any] = field(default_factory=dict)
    build: str | None = None  # what its process executes
    leaves: bool = False  # workers, when it has ended

    def start(self, terminal: int | None = None) -> None:
        """`terminal` becomes the driver's own, as that of a shell would be."""
        self.directory.mkdir(exist_ok=True)
        ports = {name: free_port() for name in self.options}
        document = {
            "processes": [
                {"name": name, "port": port, "argv": self._argv(name, port)} for name, port in ports.items()
            ],
            "url": f"http://127.0.0.1:{ports['orchestrator']}",
            "directory": str(self.directory),
            "limits": QUICK | self.limits,
            "build": self.build,
            "leaves": self.leaves,
        }
        plan = self.directory / "plan.json"
        plan.write_text(json.dumps(document))
        with (self.directory / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.launch.driver", str(plan)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=None if terminal is None else lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
            )

    def _argv(self, name: str, port: int) -> list[str]:
        events = str(self.directory / "events")
        return [STANDIN, "--name", name, "--port", str(port), "--events", events, *self.options[name]]

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self.stderr

    def wait_exit(self) -> int:
        return self.process.wait(timeout=60)

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()

    def events(self, kind: str = "") -> list[tuple[str, str, int]]:
        """(event, name, pid), in order."""
        path = self.directory / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [(event, name, int(pid)) for event, name, pid in map(str.split, lines)]
        return [line for line in found if line[0].startswith(kind)]

    def pids(self) -> set[int]:
        return {pid for _, _, pid in self.events()}

    def wait_nothing_left(self) -> None:
        wait_for(lambda: not any(map(is_running, self.pids())), "the end of all processes")

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # the guard does the rest
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.wait_nothing_left()


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Any]:
    """Makes clusters, which are not started yet, and leaves none behind."""
    made: list[Cluster] = []

    def make(options: dict[str, Sequence[str]], build: str | None = None, **limits: Any) -> Cluster:
        made.append(Cluster(tmp_path / str(len(made)), options, limits, build))
        made[-1].start()
        return made[-1]

    yield make
    for cluster in made:
        cluster.clean_up()


def test_workers_that_may_be_left_elsewhere_are_an_error_of_up_and_of_down(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", {"one": [], "orchestrator": []}, leaves=True)
    cluster.start()
    try:
        cluster.wait_ready()
        command = [sys.executable, "-m", "launch.cli", "down", "--state", str(cluster.directory)]
        down = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert cluster.wait_exit() == Exit.FAILED
        assert "the cluster does not answer; `baton down` tries that again" in cluster.stderr
        assert (down.returncode, down.stdout) == (Exit.FAILED, "")
        assert "has ended, but may have left workers on local: run `baton down` again" in down.stderr
    finally:
        cluster.clean_up()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_orchestrator_first_and_leaves_nothing(clusters: Any, number: int) -> None:
    cluster = clusters({"one": ["--child"], "two": [], "orchestrator": []}, stop_worker_s=0.5)
    cluster.wait_ready()
    assert len(cluster.pids()) == 4
    assert all(map(is_running, cluster.pids()))
    cluster.process.send_signal(number)
    assert cluster.wait_exit() == Exit.OK
    assert not any(map(is_running, cluster.pids()))
    stopped = [name for _, name, _ in cluster.events("stop")]
    assert stopped[0] == "orchestrator"
    assert sorted(stopped[1:]) == ["one", "two"]
    assert "orchestrator: ready" in cluster.stderr
    assert f"one: starting (log: {cluster.directory / 'one.log'})" in cluster.stderr
    assert "one says hello" in (cluster.directory / "one.log").read_text()
    assert "one: killed" in cluster.stderr  # its child is stubborn
    assert "two: stopped" in cluster.stderr


def test_nohup_is_respected(clusters: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        cluster = clusters({"one": [], "orchestrator": []})
    finally:
        signal.signal(signal.SIGHUP, before)
    cluster.wait_ready()
    cluster.process.send_signal(signal.SIGHUP)
    os.kill(_last(cluster, "start", "one"), signal.SIGKILL)
    wait_for(lambda: cluster.stderr.count("one: ready") == 2, "the restart, as a sign of life")


def test_the_orchestrator_alone_is_told_to_reload(clusters: Any) -> None:
    cluster = clusters({"one": [], "orchestrator": []})
    cluster.wait_ready()
    cluster.process.send_signal(signal.SIGHUP)
    wait_for(lambda: cluster.events("reload"), "the news")
    os.kill(_last(cluster, "start", "one"), signal.SIGKILL)
    wait_for(lambda: cluster.stderr.count("one: ready") == 2, "the restart, as a sign of life")
    assert [name for _, name, _ in cluster.events("reload")] == ["orchestrator"]


def test_the_end_of_the_terminal_is_the_end_of_all(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, {"one": [], "orchestrator": []}, {})
    terminal, theirs = os.openpty()
    try:
        cluster.start(terminal=theirs)
        cluster.wait_ready()
        os.close(terminal)
        assert cluster.wait_exit() == Exit.OK
        assert not any(map(is_running, cluster.pids()))
    finally:
        os.close(theirs)
        cluster.clean_up()


def test_ready_only_when_all_are(clusters: Any) -> None:
    cluster = clusters({"one": ["--silent"], "orchestrator": []})
    wait_for(lambda: "orchestrator: ready" in cluster.stderr, "the orchestrator")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait_exit() == Exit.INTERRUPTED
    assert cluster.process.stdout.read() == b""
    assert not any(map(is_running, cluster.pids()))


def test_a_child_that_dies_while_starting_ends_all(clusters: Any) -> None:
    message = "ModuleNotFoundError: No module named 'vllm'"
    cluster = clusters({"one": [], "two": ["--child", "--die", message], "orchestrator": []})
    assert cluster.wait_exit() == Exit.START_FAILED
    assert "two ended while starting, with exit code 7" in cluster.stderr
    assert f"  | {message}" in cluster.stderr
    assert "likely cause: vLLM is not installed" in cluster.stderr
    assert not any(map(is_running, cluster.pids()))


def test_a_child_that_never_gets_ready_ends_all(clusters: Any) -> None:
    cluster = clusters({"one": ["--silent"], "orchestrator": []}, start_s=3)
    assert cluster.wait_exit() == Exit.START_FAILED
    assert "not ready after 3 s: one" in cluster.stderr
    assert not any(map(is_running, cluster.pids()))


def test_sigkill_of_up_leaves_nothing(clusters: Any) -> None:
    cluster = clusters({"one": ["--child", "--stubborn"], "orchestrator": []})
    cluster.wait_ready()
    cluster.process.kill()
    cluster.wait_exit()
    cluster.wait_nothing_left()


def test_sigkill_of_up_while_it_starts_leaves_nothing(clusters: Any) -> None:
    cluster = clusters({"one": ["--child", "--silent"], "orchestrator": []})
    wait_for(lambda: cluster.events("start"), "the first child")
    cluster.process.kill()
    cluster.wait_exit()
    cluster.wait_nothing_left()


def test_a_worker_that_dies_is_started_again_with_backoff(clusters: Any) -> None:
    cluster = clusters({"one": ["--child"], "orchestrator": []}, stop_worker_s=0.5)
    cluster.wait_ready()
    for count, delay in ((1, "0.1"), (2, "0.2"), (3, "0.4")):
        worker = _last(cluster, "start", "one")
        os.kill(worker, signal.SIGKILL)
        said = f"one ended with signal SIGKILL and starts again in {delay} s (log: "
        wait_for(lambda said=said: said in cluster.stderr, said)
        wait_for(lambda count=count: cluster.stderr.count("one: ready") == count + 1, "ready again")
        assert not is_running(worker)
    children = [pid for _, name, pid in cluster.events("child") if name == "one"]
    assert [is_running(pid) for pid in children] == [False, False, False, True]
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait_exit() == Exit.OK


def test_the_orchestrator_is_started_again_too(clusters: Any) -> None:
    cluster = clusters({"one": [], "orchestrator": []})
    cluster.wait_ready()
    os.kill(_last(cluster, "start", "orchestrator"), signal.SIGTERM)
    wait_for(lambda: "orchestrator ended with exit code 0 and starts again" in cluster.stderr, "the notice")
    wait_for(lambda: cluster.stderr.count("orchestrator: ready") == 2, "ready again")
    assert _count(cluster, "start", "one") == 1


def test_the_second_signal_kills_at_once(clusters: Any) -> None:
    cluster = clusters({"one": ["--stubborn"], "orchestrator": []}, stop_worker_s=600)
    cluster.wait_ready()
    cluster.process.send_signal(signal.SIGINT)
    wait_for(lambda: _count(cluster, "stop", "one"), "the worker's SIGTERM")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait_exit() == Exit.OK
    assert "one: killed" in cluster.stderr
    assert not any(map(is_running, cluster.pids()))


def test_without_its_guard_up_stops(clusters: Any) -> None:
    cluster = clusters({"one": [], "orchestrator": []})
    cluster.wait_ready()
    for guard in _children_of(cluster.process.pid) - cluster.pids():
        os.kill(guard, signal.SIGKILL)
    assert cluster.wait_exit() == Exit.FAILED
    assert "the guard process has ended" in cluster.stderr
    assert not any(map(is_running, cluster.pids()))


def _last(cluster: Cluster, event: str, name: str) -> int:
    return [pid for _, who, pid in cluster.events(event) if who == name][-1]


def _count(cluster: Cluster, event: str, name: str) -> int:
    return sum(who == name for _, who, _ in cluster.events(event))


def _children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# --- the compiled form is built meanwhile -------------------------------------------------------


def held(gate: Path) -> str:
    """A build that goes on until somebody opens the gate, which is a fifo."""
    os.mkfifo(gate)
    return f"open({str(gate)!r}).close()"


def test_the_orchestrator_waits_for_its_build_while_workers_start(clusters: Any) -> None:
    cluster = clusters({"one": ["--silent"], "orchestrator": []}, build="print('here it is')")
    wait_for(lambda: "orchestrator: ready" in cluster.stderr, "the orchestrator")
    lines = cluster.stderr.splitlines()
    log = cluster.directory / "compile.log"
    assert lines[0] == f"compiled form: building (log: {log})"
    assert lines.index("compiled form: built") < lines.index(
        f"orchestrator: starting (log: {cluster.directory / 'orchestrator.log'})"
    )
    assert log.read_text() == "here it is\n"


def test_ready_workers_do_not_wait_for_a_build(clusters: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cluster = clusters({"one": [], "orchestrator": []}, build=held(gate))
    cluster.wait_ready()
    assert "the orchestrator starts as pure Python: its compiled form is still being built" in cluster.stderr
    assert cluster.stderr.index("one: ready") < cluster.stderr.index("orchestrator: starting")
    gate.open("w").close()
    wait_for(lambda: "takes its compiled form when it is started again" in cluster.stderr, "the build")
    assert "compiled form: built" in cluster.stderr


def test_who_insists_on_the_compiled_form_waits_for_it(
    clusters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_FORM", "compiled")
    gate = tmp_path / "gate"
    cluster = clusters({"one": [], "orchestrator": []}, build=held(gate))
    wait_for(lambda: "one: ready" in cluster.stderr, "the worker")
    gate.open("w").close()
    cluster.wait_ready()
    assert cluster.stderr.index("compiled form: built") < cluster.stderr.index("orchestrator: starting")


def test_a_build_that_fails_is_told_in_a_line(clusters: Any) -> None:
    build = "import sys; print('much before it'); sys.exit('pure Python runs: gcc is not there')"
    cluster = clusters({"one": [], "orchestrator": []}, build=build)
    cluster.wait_ready()
    assert "compiled form: not built\npure Python runs: gcc is not there\n" in cluster.stderr


def test_a_build_ends_with_the_cluster(clusters: Any, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    build = f"import os, time; open({str(started)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    cluster = clusters({"one": ["--silent"], "orchestrator": []}, build=build)
    wait_for(lambda: started.exists() and started.read_text().endswith(" "), "the build")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait_exit() == Exit.INTERRUPTED
    assert not is_running(int(started.read_text()))
