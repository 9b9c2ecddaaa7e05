"""On a real cluster of Ray: what starts serves, what is lost comes back, and nothing is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.exits import Exit
from orchestrator.wire.member import read_members
from tests.launch.backends.ray.runs import Load, Nodes, Run, chat, load
from tests.network import own_network
from tests.waiting import is_running, running_with, wait_for, wait_until_gone

pytestmark = [
    pytest.mark.ray,
    pytest.mark.processes,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: `make cluster` installs it"
    ),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and three nodes with room for three workers each, in a network of their own."""
    with own_network():
        made = Nodes(3)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def runs(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs, which it starts, and leaves none behind."""
    made: list[Run] = []

    def make(**more: Any) -> Run:
        made.append(Run(tmp_path / str(len(made)), more.pop("address", nodes.address), **more))
        made[-1].start()
        return made[-1]

    yield make
    for run in made:
        run.close()


@pytest.fixture(scope="module")
def shared(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that several tests use: each leaves two prefill and two decode workers that serve."""
    run = Run(tmp_path_factory.mktemp("shared"), nodes.address)
    run.start()
    try:
        run.wait_ready()
        yield run
    finally:
        run.close()


@pytest.fixture
def run(shared: Run) -> Run:
    shared.wait_whole()
    return shared


def wait_served(told: Load, more: int) -> None:
    """Wait until so many further requests were served."""
    enough = told.served + more
    wait_for(lambda: told.served >= enough, "requests that are served")


def test_up_to_serving(run: Run) -> None:
    with httpx.Client(trust_env=False) as client:
        assert "[DONE]" in chat(client, run.url).text
    members = read_members(run.directory / "members").members
    assert sorted(f"{member.role}/{member.name}" for member in members) == [
        "decode/0", "decode/1", "prefill/0", "prefill/1",
    ]  # fmt: skip
    assert {member.url for member in members} == {row["url"] for row in run.rows()}
    assert "sim/decode/1  | ready: http://127.0.0.1:" in run.ask("logs")


def test_an_engine_that_ends_is_started_again(run: Run) -> None:
    before = {row["name"]: row for row in run.rows()}
    victim = before["sim/decode/0"]
    with load(run.url) as told:
        wait_served(told, 20)
        os.kill(run.engine(victim["url"]), signal.SIGKILL)
        wait_for(lambda: restarts(run, "sim/decode/0") > victim["restarts"], "another start")
        after = {row["name"]: row for row in run.wait_whole()}
        wait_served(told, 20)
    assert told.failed == []
    assert after["sim/decode/0"]["url"] != victim["url"]
    assert "sim/decode/0 ended with signal SIGKILL and is started again" in run.stderr


def restarts(run: Run, name: str) -> int:
    return next(int(row["restarts"]) for row in run.rows() if row["name"] == name)


def test_a_lost_node_costs_no_request_and_its_workers_come_back(run: Run, nodes: Nodes) -> None:
    before = run.rows()
    engines = {row["name"]: run.engine(row["url"]) for row in before}
    with load(run.url) as told:
        wait_served(told, 20)
        start = time.monotonic()
        nodes.ask(f"kill {parent(parent(engines['sim/decode/0']))}")
        lost = wait_for(lambda: [pid for pid in engines.values() if not is_running(pid)], "lost engines")
        count = len(lost)
        wait_for(lambda: sum(row["restarts"] for row in run.rows()) >= total(before) + count, "other starts")
        run.wait_whole()
        seconds = time.monotonic() - start
        wait_served(told, 20)
    print(f"{count} workers were back {seconds:.1f} s after their node was killed")
    assert told.failed == []


def total(rows: list[dict[str, Any]]) -> int:
    return sum(int(row["restarts"]) for row in rows)


def test_a_rolling_restart_costs_no_request(run: Run) -> None:
    before = {row["url"] for row in run.rows()}
    with load(run.url) as told:
        wait_served(told, 20)
        assert "restarted: sim/prefill/0" in run.ask("restart", "--rolling")
        after = {row["url"] for row in run.wait_whole()}
        wait_served(told, 20)
    assert told.failed == []
    assert before.isdisjoint(after)


def test_a_pool_grows_and_shrinks_under_load(run: Run, nodes: Nodes) -> None:
    with load(run.url) as told:
        wait_served(told, 20)
        run.ask("scale", "sim/decode", "3")
        run.wait_whole(5)
        assert len(nodes.ask("left")["groups"]) == 5
        run.ask("scale", "sim/decode", "2")
        run.wait_whole(4)
        wait_served(told, 20)
    assert told.failed == []
    wait_for(lambda: len(nodes.ask("left")["groups"]) == 4, "the place that is given up")


def test_workers_outlive_the_process_that_talks_to_ray(run: Run) -> None:
    before = {row["url"] for row in run.rows()}
    (agent,) = [pid for pid in running_with("launch.backends.ray.agent") if parent(pid) == run.process.pid]
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: "Ray's client has ended, and is started again" in run.stderr, "the news")
    run.ask("scale", "sim/prefill", "3")
    run.ask("scale", "sim/prefill", "2")
    assert {row["url"] for row in run.wait_whole()} == before


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("is_killed", [False, True])
def test_down_leaves_nothing(runs: Callable[..., Run], nodes: Nodes, is_killed: bool) -> None:
    """A killed `baton up` leaves its workers, which serve on, until `baton down` ends them."""
    others = nodes.ask("left")
    run = runs(options={"spread": "node", "cpus": 0.1}, pools={"both": {"engine": "sim", "replicas": 3}})
    run.wait_ready()
    assert len(nodes.ask("left")["groups"]) == len(others["groups"]) + 1  # that spreads all three
    engines = [run.engine(row["url"]) for row in run.rows()]
    if is_killed:
        run.process.kill()
        run.process.wait()
        assert all(map(is_running, engines))
    told = run.ask("down")
    assert ("ends what is left on ray" in told) is is_killed
    wait_until_gone(engines)
    wait_for(lambda: nodes.ask("left") == others, "the end of all actors and groups")
    assert "nothing runs" in run.ask("down", code=Exit.FAILED)


def test_ctrl_c_while_places_are_missing_leaves_nothing(runs: Callable[..., Run], nodes: Nodes) -> None:
    others = nodes.ask("left")
    run = runs(options={"resources": {"H200": 1}})
    missing = (
        "a worker of sim/prefill needs 1 CPU, 1 H200 on one node, and no node has more than 3 CPU, 0 H200"
    )
    wait_for(lambda: missing in run.stderr, "what is missing")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == Exit.INTERRUPTED
    wait_for(lambda: nodes.ask("left") == others, "the end of all actors and groups")


def test_an_engine_that_does_not_start_is_named_with_its_last_lines(runs: Callable[..., Run]) -> None:
    run = runs(pools={"both": {"engine": "sim", "args": ["--bogus"]}})
    assert run.process.wait(60) == Exit.START_FAILED
    assert "sim/both/0 ended while starting, with exit code 2. Its last lines" in run.stderr
    assert "unrecognized arguments: --bogus" in run.stderr
