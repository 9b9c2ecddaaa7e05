"""Baton's own processes are started here: simulated workers, and what runs over a config."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.bodies import MODEL
from bench.shared.processes import START_LIMIT_S, Failed, free_port, python, running, wait_for


@dataclass(frozen=True)
class Process:
    """It listens on a port of this machine; the processes that it starts are its descendants."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def sim_worker(
    *options: str,
    model: str = MODEL,
    port: int | None = None,
    cores: Set[int] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Run a simulated worker for the block. Raises `Failed` if it does not start."""
    port = port or free_port()
    command = python("-m", "worker.sim", "--model-name", model, "--port", str(port), *options)
    with running(command, port, cores=cores, env=env) as pid:
        yield Process(pid, port)


@contextmanager
def sim_pair(*options: str) -> Iterator[tuple[Process, Process]]:
    """Run a prefill worker and a decode worker for the block."""
    with (
        sim_worker("--role", "prefill", *options) as prefill,
        sim_worker("--role", "decode", *options) as decode,
    ):
        yield prefill, decode


def config(port: int, pools: Mapping[str, Any], model: str = MODEL, **orchestrator: Any) -> dict[str, Any]:
    """Return a config of one model. `pools` are by role, `orchestrator` has options beside `listen`."""
    return {
        "orchestrator": {"listen": f"127.0.0.1:{port}", **orchestrator},
        "models": [{"name": model, **pools}],
    }


def urls(*ports: int) -> dict[str, Any]:
    """Return a pool of workers that Baton does not start."""
    return {"urls": [f"http://127.0.0.1:{port}" for port in ports]}


@contextmanager
def baton(
    command: str,
    document: Mapping[str, Any],
    port: int,
    *arguments: str,
    cores: Set[int] | None = None,
    env: Mapping[str, str] | None = None,
    files: int | None = None,
    limit_s: float = START_LIMIT_S,
) -> Iterator[Process]:
    """Run `baton COMMAND` over the config `document` for the block. `port` is where it listens.

    `files` is how many descriptors it may have, without a way to get more.
    Raises `Failed` if it does not start. It may not be ready yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.yaml")
        path.write_text(json.dumps(document))
        argv = python("-m", "launch.cli", command, str(path), *arguments)
        if files is not None:
            argv = ["/bin/sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *argv]
        with running(argv, port, cores=cores, env=env, limit_s=limit_s) as pid:
            yield Process(pid, port)


def wait_ready(port: int, limit_s: float = START_LIMIT_S) -> None:
    """Return once `/ready` is answered with 200. Raises `Failed` after the limit."""
    wait_for(lambda: get(port, "/ready").is_success, "the orchestrator to be ready", limit_s)


def metrics(page: str) -> dict[str, float]:
    """Return counters and gauges, sums over all labels; of connections to workers only the busy ones."""
    return {
        family.name: sum(
            sample.value
            for sample in family.samples
            if sample.labels.get("state") != "idle" and not sample.name.endswith("_created")
        )
        for family in text_string_to_metric_families(page)
        if family.type in ("counter", "gauge")
    }


def get(port: int, path: str) -> httpx.Response:
    """Ask on a connection of its own, closed before this returns. Raises `Failed` if no answer comes."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30, trust_env=False)
    except httpx.HTTPError as error:
        raise Failed(f"{path} on port {port}: {error!r}") from error
