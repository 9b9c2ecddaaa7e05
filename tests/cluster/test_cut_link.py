"""Hosts that vanish from the network: no packet comes any more, and no connection is closed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import hosts
from tests.cluster.hosts import Host, Lab, lab
from tests.cluster.load import loaded
from tests.orchestrator.running import MODEL
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.netns,
    pytest.mark.skipif(not hosts.can_be_made(), reason="needs root, ip and network namespaces"),
]

PORT, ADMIN, WORKER = 8000, 8001, 8100
SIM = {"prefill_us_per_token": 500, "decode_ms_per_token": 5}


class Cluster:
    """Orchestrators on some hosts, and on others one prefill and one decode worker each."""

    def __init__(
        self, lab: Lab, directory: Path, orchestrators: Sequence[Host], workers: Sequence[Host]
    ) -> None:
        self.orchestrators = orchestrators
        self._config = directory / "config.yaml"
        pools = {
            role: {
                "engine": "sim",
                "sim": SIM,
                "workers": [
                    {"host": host.address, "port": port, "side_channel_port": port + 10} for host in workers
                ],
            }
            for role, port in (("prefill", WORKER), ("decode", WORKER + 1))
        }
        document = {
            "orchestrator": {
                "listen": f"0.0.0.0:{PORT}",
                "admin": f"127.0.0.1:{ADMIN}",
                "insecure_no_auth": True,
            },
            "models": [{"name": MODEL, **pools}],
        }
        self._config.write_text(json.dumps(document))
        for index, host in enumerate(workers):
            for role in ("prefill", "decode"):
                log = directory / f"{role}-{index}.log"
                lab.start(host, _baton("worker", str(self._config), f"{MODEL}/{role}/{index}"), log)
        for host in orchestrators:
            lab.start(host, _baton("orchestrator", str(self._config)), directory / f"{host.address}.log")
        for host in orchestrators:
            self.wait_states(host, {"ready"})

    def states(self, host: Host) -> set[str]:
        """The states of all workers as the orchestrator on this host sees them."""
        rows = self._admin(host, "/admin/workers")
        return {row["state"] for row in rows} if isinstance(rows, list) else set()

    def loads(self, host: Host) -> set[int]:
        return {row["in_flight"] for row in self._admin(host, "/admin/workers")}

    def wait_states(self, host: Host, states: set[str]) -> None:
        wait_for(lambda: self.states(host) == states, f"workers that are {states}")

    def _admin(self, host: Host, path: str) -> Any:
        with host.entered(), contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{ADMIN}{path}", trust_env=False).json()
        return None


def _baton(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *words]


@contextlib.contextmanager
def cut(host: Host) -> Iterator[None]:
    host.cut()
    try:
        yield
    finally:
        host.mend()


def test_no_request_fails_when_a_host_with_workers_is_cut_off(tmp_path: Path) -> None:
    with lab(3) as network:
        front, *backs = network.hosts
        cluster = Cluster(network, tmp_path, [front], backs)
        with loaded(f"http://127.0.0.1:{PORT}", front) as load:
            load.wait_for(50)
            with cut(backs[1]):
                cluster.wait_states(front, {"ready", "ejected"})
                load.wait_for(100)
            cluster.wait_states(front, {"ready"})
            load.wait_for(50)
        print(
            f"{load.answered} answered, {len(load.failures)} failed, the slowest after {load.slowest_s:.1f} s"
        )
        assert load.failures == []
        wait_for(lambda: cluster.loads(front) == {0}, "all seats to be given back")


def test_an_orchestrator_that_is_cut_off_harms_only_its_own_clients(tmp_path: Path) -> None:
    with lab(4) as network:
        near, far, *backs = network.hosts
        cluster = Cluster(network, tmp_path, [near, far], backs)
        with loaded(f"http://127.0.0.1:{PORT}", near) as load:
            load.wait_for(50)
            with cut(far):
                cluster.wait_states(far, {"ejected", "suspect"})
                load.wait_for(50)
                assert cluster.states(near) == {"ready"}
            wait_for(lambda: cluster.states(far) <= {"ready", "probing"}, "workers that are back")
        assert load.failures == []
        with loaded(f"http://127.0.0.1:{PORT}", far) as load:  # who is back proves itself by a request
            cluster.wait_states(far, {"ready"})
            load.wait_for(30)
        assert load.failures == []
