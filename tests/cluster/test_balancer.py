"""Several orchestrators, which know nothing of each other, behind Envoy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.exits import Exit
from orchestrator.config.addresses import REPLICA_PORTS
from tests.cluster import envoy
from tests.cluster.envoy import HEALTH_INTERVAL_S, Envoy, balancing
from tests.cluster.load import Load, loaded
from tests.launch.operate.cluster import Cluster, running
from tests.orchestrator.running import Orchestrator, simulated
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.envoy,
    pytest.mark.skipif(envoy.binary() is None, reason="needs Envoy: `make cluster` installs it"),
]

NOTICE_S = 10 * HEALTH_INTERVAL_S  # for a machine that is busy; twice is enough for one that is not


@contextlib.contextmanager
def replicas(directory: Path, count: int) -> Iterator[list[Orchestrator]]:
    """Orchestrators of one process each in front of the same four workers."""
    options = ["--decode-ms-per-token", "5", "--prefill-us-per-token", "500"]
    with simulated("prefill", "prefill", "decode", "decode", options=options) as workers:
        made: list[Orchestrator] = []
        try:
            for index in range(count):
                own = directory / str(index)
                own.mkdir()
                made.append(Orchestrator(own, workers, processes=1, drain_notice_s=NOTICE_S))
            for orchestrator in made:
                orchestrator.wait_ready()
            yield made
        finally:
            for orchestrator in made:
                orchestrator.clean_up()


def _addresses(orchestrators: list[Orchestrator]) -> list[str]:
    return [orchestrator.url.removeprefix("http://") for orchestrator in orchestrators]


def _roll(envoy: Envoy, orchestrators: list[Orchestrator], load: Load) -> None:
    """Restart one after the other, the next one once Envoy has found the last one well."""
    for orchestrator in orchestrators:
        orchestrator.restart()
        envoy.wait_healthy(_addresses(orchestrators))
        load.wait_for(50)


def test_no_request_fails_while_all_are_restarted_in_turn(tmp_path: Path) -> None:
    with replicas(tmp_path, 2) as orchestrators:
        with (
            balancing(tmp_path, _addresses(orchestrators), HEALTH_INTERVAL_S) as envoy,
            loaded(envoy.url) as load,
        ):
            load.wait_for(100)
            _roll(envoy, orchestrators, load)
        print(f"{load.answered} answered, {len(load.failures)} failed")
        assert load.failures == []
        assert all(orchestrator.answered() > 0 for orchestrator in orchestrators)


def test_no_request_fails_while_workers_and_orchestrators_of_a_run_are_restarted(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, prefill=2, decode=2, replicas=2, drain_notice_s=NOTICE_S)
    with running(cluster):
        host, _, port = cluster.listen.rpartition(":")
        members = [f"{host}:{int(port) + more}" for more in (0, REPLICA_PORTS)]
        with balancing(tmp_path, members, HEALTH_INTERVAL_S) as envoy, loaded(envoy.url, model="sim") as load:
            load.wait_for(100)
            done = cluster.command("restart", "--rolling")
            assert done.returncode == Exit.OK, done.stderr
            load.wait_for(50)
        print(f"{load.answered} answered, {len(load.failures)} failed")
        assert load.failures == []


def test_one_that_is_killed_costs_only_what_it_was_serving(tmp_path: Path) -> None:
    """Who is killed cannot end its requests; Envoy sends no more there, and the other one serves on."""
    with replicas(tmp_path, 2) as orchestrators:
        with (
            balancing(tmp_path, _addresses(orchestrators), HEALTH_INTERVAL_S) as envoy,
            loaded(envoy.url) as load,
        ):
            load.wait_for(50)
            orchestrators[0].process.kill()
            wait_for(lambda: len(envoy.healthy()) == 1, "Envoy to notice")
            load.wait_for_round()
            failed = len(load.failures)
            wanted = load.answered + 100
            wait_for(lambda: load.answered >= wanted, "answers of the other one")
            assert len(load.failures) == failed
        held = orchestrators[1].worker_loads()
        assert set(held.values()) == {0}
