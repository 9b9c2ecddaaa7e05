"""The commands, where a run has several orchestrators."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.exits import Exit
from tests.launch.operate.cluster import Cluster, running
from tests.waiting import wait_for

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), prefill=2, decode=2, replicas=2)
    with running(made):
        yield made


def admins(cluster: Cluster) -> list[str]:
    host, _, port = cluster.admin.rpartition(":")
    return [f"http://{host}:{int(port) + more}" for more in (0, 10)]


def known(cluster: Cluster) -> list[dict[str, str]]:
    """The states of the workers as each of the orchestrators knows them."""
    found = [httpx.get(f"{url}/admin/workers", trust_env=False).json() for url in admins(cluster)]
    return [{row["address"]["name"]: row["state"] for row in rows} for rows in found]


def ask_each(cluster: Cluster) -> None:
    for port in (0, 10):
        host, _, first = cluster.listen.rpartition(":")
        body = {"model": "sim", "prompt": "What is prefill?", "max_tokens": 8}
        url = f"http://{host}:{int(first) + port}/v1/completions"
        assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 200


def test_all_of_them_serve_and_are_shown_as_one(cluster: Cluster) -> None:
    before = sum(row["served"] or 0 for row in cluster.json("ps")["rows"])
    ask_each(cluster)
    document: dict[str, Any] = cluster.json("ps")
    names = {row["name"] for row in document["rows"] if row["role"] == "orchestrator"}
    assert names == {"orchestrator", "orchestrator-1"}
    assert sum(row["served"] or 0 for row in document["rows"]) == before + 4  # two legs each
    assert [process["orchestrator"] for process in document["data_processes"]] == [0, 1]
    assert len(cluster.json("trace")["requests"]) >= 2


def test_a_worker_is_drained_at_all_of_them(cluster: Cluster) -> None:
    assert cluster.command("drain", "sim/decode/0", "--wait").returncode == Exit.OK
    assert [states["sim/decode/0"] for states in known(cluster)] == ["draining", "draining"]
    assert cluster.command("undrain", "sim/decode/0").returncode == Exit.OK
    wait_for(lambda: {state for states in known(cluster) for state in states.values()} == {"ready"}, "all")


def test_by_the_urls_of_their_admin_listeners(cluster: Cluster, tmp_path: Path) -> None:
    words = [word for url in admins(cluster) for word in ("--admin", url)]
    done = cluster.command("drain", "sim/prefill/0", *words, HOME=str(tmp_path))
    assert done.returncode == Exit.OK, done.stderr
    assert [states["sim/prefill/0"] for states in known(cluster)] == ["draining", "draining"]
    cluster.command("undrain", "sim/prefill/0", *words)


def test_workers_come_and_go_everywhere_under_the_same_names(cluster: Cluster) -> None:
    for count in (4, 3, 2):
        done = cluster.command("scale", "sim/decode", str(count))
        assert done.returncode == Exit.OK, done.stderr
        expected = {f"sim/decode/{index}" for index in range(count)} | {"sim/prefill/0", "sim/prefill/1"}
        wait_for(lambda: [set(states) for states in known(cluster)] == [expected] * 2, "the same workers")  # noqa: B023
    ask_each(cluster)


def test_all_is_restarted_in_turn(cluster: Cluster) -> None:
    before = {row["name"]: row["pid"] for row in cluster.json("ps")["rows"]}
    assert cluster.command("restart", "--rolling").returncode == Exit.OK
    after = {row["name"]: row["pid"] for row in cluster.json("ps")["rows"]}
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    ask_each(cluster)


def test_who_does_not_answer_is_named_and_comes_back(cluster: Cluster) -> None:
    (second,) = (row for row in cluster.json("ps")["rows"] if row["name"] == "orchestrator-1")
    os.kill(second["pid"], signal.SIGSTOP)
    try:
        shown = cluster.command("drain", "sim/decode/1")
        assert shown.returncode == Exit.FAILED
        assert f"the admin listener {admins(cluster)[1]} does not answer" in shown.stderr
    finally:
        os.kill(second["pid"], signal.SIGKILL)
    wait_for(lambda: cluster.rows()["orchestrator-1"]["restarts"], "its next start")
    wait_for(lambda: cluster.rows()["orchestrator-1"]["state"] == "ready", "its workers")
    cluster.command("undrain", "sim/decode/1")
    wait_for(lambda: {state for states in known(cluster) for state in states.values()} == {"ready"}, "all")
    ask_each(cluster)
