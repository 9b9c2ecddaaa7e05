"""Workers on a real Slurm, with several nodes on this machine. Each worker has a node to itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.shared.processes import free_port
from launch.exits import Exit
from launch.local.run_state import FILE, read
from tests.launch.backends.slurm.cluster import PARTITION, SlurmCluster, lacks, slurm_cluster
from tests.launch.operate.cluster import SIM, Cluster, loaded, running
from tests.waiting import running_with, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.processes,
    pytest.mark.skipif(lacks() is not None, reason=lacks() or ""),
]

# Until Slurm has noticed that a node is gone: it looks twice a minute.
LOST_S = 180.0
WORKERS = {f"sim/{role}/{index}" for role in ("prefill", "decode") for index in (0, 1)}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=6) as made:
        yield made


class OnSlurm(Cluster):
    """`baton up` that has its workers on a Slurm."""

    def __init__(self, directory: Path, slurm: SlurmCluster, **options: Any) -> None:
        super().__init__(directory)
        self.slurm = slurm
        self.env |= slurm.environ
        document = json.loads(self.config.read_text())
        pool = {"engine": "sim", "replicas": 2, "sim": SIM}
        document["models"] = [{"name": "sim", "prefill": pool, "decode": pool}]
        document["launch"] = {"backend": "slurm", "slurm": {"sbatch": ["--exclusive"], **options}}
        self.config.write_text(json.dumps(document))

    def node_of(self, worker: str) -> str:
        """Return the node that a worker runs on."""
        pool, _, index = worker.rpartition("/")
        rows = self.slurm.run("squeue", "--noheader", "--array", "--states=R", "--format", "%K|%N|%j")
        split = (row.split("|") for row in rows.splitlines())
        return next(node for number, node, name in split if number == index and name.split()[1] == pool)

    def up_fails(self) -> str:
        """Return what `baton up` says that does not come up."""
        done = self.command("up", str(self.config))
        assert done.returncode == Exit.START_FAILED, done.stderr
        assert "was stopped" in self.command("ps").stderr
        assert not any(read(file).has_left_workers() for file in self.directory.glob(f"**/{FILE}"))
        return done.stderr


@pytest.fixture(scope="module")
def cluster(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnSlurm]:
    made = OnSlurm(tmp_path_factory.mktemp("run"), slurm)
    with running(made):
        yield made
    assert slurm.jobs() == []
    assert not any((made.run / name).exists() for name in ("members", "tasks", "config.json"))


def all_serve(cluster: Cluster, names: set[str] = WORKERS) -> bool:
    return cluster.workers() == dict.fromkeys(names, "ready")


def test_workers_serve_from_their_nodes(cluster: OnSlurm) -> None:
    assert cluster.ask().status_code == 200
    rows = cluster.rows()
    assert set(rows) == WORKERS | {"orchestrator"}
    assert {row["state"] for row in rows.values()} == {"ready"}
    assert len({cluster.node_of(name) for name in WORKERS}) == 4
    assert [rows[name]["pid"] for name in WORKERS] == [None] * 4
    logged = cluster.command("logs", "sim/decode/1")
    assert logged.stdout == f"ready: {rows['sim/decode/1']['url']}\n"


def test_an_engine_that_is_killed_is_started_again_in_its_place(cluster: OnSlurm) -> None:
    before = cluster.rows()["sim/decode/1"]
    node, jobs = cluster.node_of("sim/decode/1"), sorted(cluster.slurm.jobs())
    with loaded(cluster) as load:
        kill_engine(before["url"])
        wait_for(lambda: cluster.rows()["sim/decode/1"]["restarts"] == before["restarts"] + 1, "a restart")
        wait_for(lambda: all_serve(cluster), "all to serve")
    assert load.failures == []
    after = cluster.rows()["sim/decode/1"]
    assert after["url"] != before["url"]
    assert (cluster.node_of("sim/decode/1"), sorted(cluster.slurm.jobs())) == (node, jobs)


def kill_engine(url: str) -> None:
    for pid in running_with(f"--port\0{url.rpartition(':')[2]}\0"):
        os.kill(pid, signal.SIGKILL)


def test_no_request_fails_while_all_are_restarted_in_their_places(cluster: OnSlurm) -> None:
    before, jobs = cluster.rows(), sorted(cluster.slurm.jobs())
    with loaded(cluster) as load:
        done = cluster.command("restart", "--rolling")
        assert done.returncode == Exit.OK, done.stderr
    assert load.failures == []
    after = cluster.rows()
    assert all(after[name]["url"] != before[name]["url"] for name in WORKERS)
    assert all(after[name]["restarts"] == before[name]["restarts"] + 1 for name in WORKERS)
    assert sorted(cluster.slurm.jobs()) == jobs


def test_no_request_fails_while_a_pool_grows_and_shrinks(cluster: OnSlurm) -> None:
    with loaded(cluster) as load:
        assert cluster.json("scale", "sim/decode", "3")["started"] == ["sim/decode/2"]
        wait_for(lambda: all_serve(cluster, WORKERS | {"sim/decode/2"}), "the third one to serve")
        assert len(cluster.slurm.jobs()) == 5
        assert cluster.json("scale", "sim/decode", "2")["stopped"] == ["sim/decode/2"]
        wait_for(lambda: all_serve(cluster), "two to serve")
    assert load.failures == []
    wait_for(lambda: len(cluster.slurm.jobs()) == 4, "its place to be given up")


def test_a_task_that_slurm_is_to_end_drains_first(cluster: OnSlurm) -> None:
    """Slurm sends this signal before the time of a job is over, too."""
    old = cluster.rows()["sim/decode/1"]
    with loaded(cluster) as load:
        task = next(task for task in cluster.slurm.jobs() if task.endswith("_1") and is_decode(cluster, task))
        cluster.slurm.run("scancel", "--batch", "--signal=TERM", task)
        wait_for(lambda: task not in cluster.slurm.jobs(), "the end of the task")
        wait_for(lambda: all_serve(cluster), "another one to serve")
    assert load.failures == []
    assert "the worker is free, and ends" in cluster.command("logs", "sim/decode/1").stdout
    assert cluster.rows()["sim/decode/1"]["url"] != old["url"]
    assert f"sim/decode/1: job {task} has ended, with COMPLETED\n" in cluster.stderr


def is_decode(cluster: OnSlurm, task: str) -> bool:
    return "sim/decode" in cluster.slurm.run("squeue", "--noheader", "--jobs", task, "--format", "%j")


def test_no_request_fails_when_a_job_is_cancelled(cluster: OnSlurm) -> None:
    """Slurm tells the engine at the same time, which cannot drain: other workers go on."""
    task = next(task for task in cluster.slurm.jobs() if task.endswith("_0") and is_decode(cluster, task))
    with loaded(cluster) as load:
        cluster.slurm.run("scancel", task)
        wait_for(lambda: task not in cluster.slurm.jobs(), "the end of the task")
        wait_for(lambda: all_serve(cluster), "another one to serve")
    assert load.failures == []
    assert f"sim/decode/0: job {task} has ended, with CANCELLED" in cluster.stderr
    assert "sim/decode/0 ended with no known exit code and is started again" in cluster.stderr


def test_no_request_fails_when_the_time_of_all_jobs_ends(cluster: OnSlurm) -> None:
    before, jobs = cluster.rows(), set(cluster.slurm.jobs())
    with loaded(cluster) as load:
        for job in jobs:
            cluster.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        wait_for(lambda: not jobs & set(cluster.slurm.jobs()), "all to have other places")
        wait_for(lambda: all_serve(cluster), "all to serve")
    assert load.failures == []
    assert cluster.stderr.count(" moves, as its place is lost soon") == len(WORKERS)
    after = cluster.rows()
    assert all(after[name]["url"] != before[name]["url"] for name in WORKERS)


def test_no_request_fails_when_nodes_are_lost(cluster: OnSlurm) -> None:
    lost = {name: cluster.node_of(name) for name in ("sim/prefill/1", "sim/decode/0")}
    before = cluster.rows()
    try:
        with loaded(cluster) as load:
            begun = time.monotonic()
            for name, node in lost.items():  # one after the other: who loses two workers is not helped
                cluster.slurm.kill_node(node)
                wait_for(lambda name=name: cluster.workers()[name] != "ready", "the loss to be noticed")
            wait_for(lambda: are_restarted(cluster, lost, before), "both to be placed anew", LOST_S)
            wait_for(lambda: all_serve(cluster), "all to serve", LOST_S)
            print(f"two nodes were replaced after {time.monotonic() - begun:.0f} s")
            assert not {cluster.node_of(name) for name in lost} & {*lost.values()}
    finally:
        for node in lost.values():
            cluster.slurm.start_node(node)
    assert load.failures == []
    assert "has lost its node, and waits in Slurm's queue: BeginTime" in cluster.stderr
    wait_for(lambda: {cluster.slurm.state_of(node) for node in lost.values()} == {"idle"}, "the nodes")


def are_restarted(cluster: OnSlurm, names: Iterable[str], before: dict[str, dict[str, Any]]) -> bool:
    rows = cluster.rows()
    return all(rows[name]["restarts"] > before[name]["restarts"] for name in names)


# --- runs of their own ------------------------------------------------------------------------------


def test_down_ends_what_a_killed_run_has_left(slurm: SlurmCluster, tmp_path: Path) -> None:
    before = set(slurm.jobs())
    cluster = OnSlurm(tmp_path, slurm, sbatch=[], folder=str(tmp_path / "a folder"))
    with running(cluster):
        assert cluster.up is not None
        cluster.up.send_signal(signal.SIGKILL)
        cluster.up.wait()
        assert len(set(slurm.jobs()) - before) == 4
        assert read(cluster.run / FILE).handle["folder"] == str(tmp_path / "a folder" / cluster.run.name)
        assert cluster.command("down").returncode == Exit.OK
        assert set(slurm.jobs()) == before
    left = {path.suffix for path in (tmp_path / "a folder" / cluster.run.name).iterdir()}
    assert left == {".log", ".sbatch"}
    assert (cluster.run / "sim-decode-0.log").read_text().startswith("ready: ")


def test_a_refusal_of_slurm_is_told(slurm: SlurmCluster, tmp_path: Path) -> None:
    before = set(slurm.jobs())
    said = OnSlurm(tmp_path, slurm, partition="nosuch").up_fails()
    assert "sim/prefill gets no place in Slurm: sbatch refuses: invalid partition specified: nosuch" in said
    said = OnSlurm(tmp_path, slurm, sbatch=["--gres=gpu:8"]).up_fails()
    assert "sim/prefill gets no place in Slurm: sbatch refuses: Batch job submission failed: " in said
    assert set(slurm.jobs()) == before


def test_what_waits_in_the_queue_says_why(slurm: SlurmCluster, tmp_path: Path) -> None:
    cluster = OnSlurm(tmp_path, slurm, partition=PARTITION, sbatch=["--hold"])
    up = cluster.popen("up", str(cluster.config))
    assert up.stderr is not None
    try:
        said = next(line for line in up.stderr if "waits in Slurm's queue" in line)
        assert "JobHeldUser: it is held: `scontrol release " in said
    finally:
        up.send_signal(signal.SIGINT)
        up.communicate(timeout=60)
    assert up.returncode == Exit.INTERRUPTED
    assert not any(cluster.run.name in name for name in names(slurm))


def names(slurm: SlurmCluster) -> list[str]:
    return slurm.run("squeue", "--noheader", "--format", "%j").splitlines()


def test_garbage_among_the_members_is_named(cluster: OnSlurm) -> None:
    (cluster.run / "members" / "stray.json").write_text("{")
    wait_for(lambda: "stray.json is left out: " in cluster.stderr, "a line about it")
    (cluster.run / "members" / "stray.json").unlink()
    assert cluster.ask().status_code == 200


def test_slurm_may_be_away(slurm: SlurmCluster, cluster: OnSlurm) -> None:
    with loaded(cluster) as load:
        slurm.stop_controller()
        wait_for(lambda: "nothing is known of their jobs meanwhile" in cluster.stderr, "a line about it")
        slurm.start_controller()
        wait_for(lambda: "Slurm answers again" in cluster.stderr, "a line about it")
    assert load.failures == []
    assert all_serve(cluster)


@pytest.mark.skipif(os.geteuid() != 0, reason="hides a folder from a node, which root alone can")
def test_a_folder_that_a_node_does_not_have_is_named(slurm: SlurmCluster, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    node = next(node for node in slurm.nodes if slurm.state_of(node) == "idle")
    slurm.hide(hidden, node)
    try:
        said = OnSlurm(tmp_path, slurm, sbatch=[f"--nodelist={node}"], folder=str(hidden)).up_fails()
    finally:
        slurm.hide(None, node)
    assert f"{hidden}/run-" in said
    assert f"cannot be used on {node}: launch.slurm.folder must be a folder that all nodes" in said


def test_a_machine_without_slurm_is_told(tmp_path: Path, slurm: SlurmCluster) -> None:
    cluster = OnSlurm(tmp_path, slurm)
    cluster.env["PATH"] = str(tmp_path)
    assert "there is no sbatch here: run this where Slurm's commands are" in cluster.up_fails()


def test_a_controller_that_does_not_answer_is_told(tmp_path: Path, slurm: SlurmCluster) -> None:
    """And as nothing was submitted, nobody is to ask that controller for jobs of the run."""
    cluster = OnSlurm(tmp_path, slurm)
    elsewhere = tmp_path / "slurm.conf"
    lines = Path(slurm.environ["SLURM_CONF"]).read_text().splitlines()
    lines = [f"SlurmctldPort={free_port()}" if line.startswith("SlurmctldPort") else line for line in lines]
    elsewhere.write_text("\n".join(lines) + "\n")
    cluster.env["SLURM_CONF"] = str(elsewhere)
    assert "no cluster of Slurm can be used from here: squeue refuses: " in cluster.up_fails()


def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    with slurm_cluster(tmp_path / "slurm", nodes=1) as made:
        script = tmp_path / "job"
        script.write_text("#!/bin/bash\nsleep 1000 &\nsleep 1000\n")
        made.run("sbatch", "--output=/dev/null", str(script))
        wait_for(lambda: made.state_of("n1") != "idle", "the job")
    assert not running_with(str(made.folder))
    assert subprocess.run(("pgrep", "-f", "sleep 1000"), check=False).returncode == 1
