"""Clusters of real vLLM workers on the CPU, started by `baton up` as a user would, shared by the session."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.shared.processes import PORTS, free_port, is_free
from tests.baton import ROOT, SETTLE_S, START_S, baton
from tests.metrics import sum_of
from tests.waiting import wait_for

MODEL = ROOT / "configs/models/tiny-chat"
DATA: dict[str, Any] = yaml.safe_load((ROOT / "configs/models/tiny-chat-data.yaml").read_text())


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.processes)
            item.add_marker(pytest.mark.timeout(START_S + 300))


ARGS = ["--max-model-len", "4096", "--max-num-seqs", "32"]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
DECODE = "{device: cpu, args: *args}"
CONFIG = """
orchestrator: {{listen: "127.0.0.1:{listen}", admin: "127.0.0.1:{admin}"}}
base_port: {base}
models:
  - name: tiny-chat
    path: {model}
    prefill: {{device: cpu, args: &args {args}, env: {prefill_env}}}
    decode: {decode}
    both: {both}
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `front` is its orchestrator, the others can be asked directly."""

    config: Path
    front: str
    admin: str
    prefill: str
    decode: str


class Stage:
    """At most one cluster runs at a time: the engines of two would take twice the memory, and the cores that
    the other one's answers are computed on while they start."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._stack = contextlib.ExitStack()
        self._name = ""
        self._cluster: Cluster | None = None

    def show(self, name: str, start: Callable[[Path], contextlib.AbstractContextManager[Cluster]]) -> Cluster:
        """The cluster of that name; another one that runs is stopped first."""
        if self._name != name or self._cluster is None:
            self.clear()
            self._name = name
            self._cluster = self._stack.enter_context(start(self._factory.mktemp(name)))
        return self._cluster

    def clear(self) -> None:
        self._cluster = None
        self._stack.close()


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory)
    yield stage
    stage.clear()


@pytest.fixture(scope="module")
def cluster(stage: Stage) -> Cluster:
    """One prefill and one decode worker that decode msgpack, behind an orchestrator that sends it. A
    connection to the prefill worker may carry many requests.
    """
    env = {"BATON_STREAMS": "mux"}
    return stage.show(
        "cluster", lambda folder: running_cluster(folder, free_base(), args=TOOLS, prefill_env=env)
    )


@pytest.fixture(scope="module")
def mixed(stage: Stage) -> Cluster:
    """Workers of two kinds: prefill parses with orjson, decode is plain vLLM that Baton did not start."""
    return stage.show("mixed", mixed_cluster)


@pytest.fixture
def trio(stage: Stage) -> Cluster:
    """A pair, and a worker that does both: it takes over when one of the pair is gone. All are ready."""
    cluster = stage.show("trio", lambda folder: running_cluster(folder, free_base(), both=DECODE))
    wait_until_whole(cluster)
    return cluster


@contextlib.contextmanager
def mixed_cluster(folder: Path) -> Iterator[Cluster]:
    base = free_base()
    with plain_vllm(folder, base + 1) as url:
        decode = f"{{urls: ['{url}']}}"
        env = {"BATON_TRANSPORT": "orjson"}
        with running_cluster(folder, base, decode=decode, prefill_env=env) as started:
            yield started


def config_text(
    base: int,
    *,
    args: Sequence[str] = (),
    decode: str = DECODE,
    both: str = "null",
    prefill_env: Mapping[str, str] | None = None,
) -> str:
    """A cluster at `base` (prefill), `base` + 1 (decode), + 2 (both), + 10 (data plane) and + 11 (admin)."""
    return CONFIG.format(
        listen=base + 10,
        admin=base + 11,
        base=base,
        model=MODEL,
        args=[*ARGS, *args],
        prefill_env=dict(prefill_env or {}),
        decode=decode,
        both=both,
    )


@contextlib.contextmanager
def running_cluster(
    folder: Path,
    base: int,
    *,
    args: Sequence[str] = (),
    decode: str = DECODE,
    both: str = "null",
    prefill_env: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """`baton up` with msgpack as its transport."""
    config = folder / "cluster.yaml"
    config.write_text(config_text(base, args=args, decode=decode, both=both, prefill_env=prefill_env))
    with baton("up", str(config), cwd=folder, transport="msgpack") as front:
        yield Cluster(config, front, *(f"http://127.0.0.1:{base + offset}" for offset in (11, 0, 1)))


@contextlib.contextmanager
def plain_vllm(folder: Path, port: int) -> Iterator[str]:
    """A decode worker as somebody else would start it: vLLM's own server, none of ours in it."""
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_buffer_device": "cpu"}
    env = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 1000),
    }
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    argv += ["--served-model-name", "tiny-chat", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--enforce-eager", "--max-model-len", "4096"]
    argv += ["--enable-prompt-tokens-details", "--enable-request-id-headers"]
    argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    argv += ["--kv-transfer-config", json.dumps(connector)]
    with (folder / "plain.log").open("wb") as log:
        process = subprocess.Popen(
            argv, cwd=folder, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def orchestrator(cluster: Cluster, transport: str, folder: Path) -> Iterator[str]:
    """One more orchestrator over the same workers, with a transport of its own; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = ["orchestrator", str(cluster.config)]
    argv += ["--set", f"orchestrator.listen=127.0.0.1:{port}", "--set", "orchestrator.admin=null"]
    with baton(*argv, cwd=folder, transport=transport, ready_at=f"{url}/ready"):
        yield url


def free_base() -> int:
    """A base port whose workers, listeners and side channels (1000 higher) are free."""
    for base in range(PORTS.stop, 30_000, 20):
        if all(map(is_free, (base, base + 1, base + 2, base + 10, base + 11, base + 1000, base + 1001))):
            return base
    raise AssertionError("no free ports")


# --- what is checked after every test -----------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_stays_pinned(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the prefill worker holds no block, long before a lease could have freed it."""
    yield
    for name in ("cluster", "mixed"):
        if name in request.fixturenames:
            assert_nothing_pinned(request.getfixturevalue(name))


def assert_nothing_pinned(cluster: Cluster) -> None:
    wait_for(lambda: metric(cluster.prefill, "vllm:kv_cache_usage_perc") == 0, "no pinned blocks", SETTLE_S)
    # A block that nobody pulled would be freed by its lease in the end, and counted here.
    assert metric(cluster.prefill, "vllm:nixl_num_kv_expired_reqs_total") == 0


def metric(worker: str, name: str) -> float:
    return sum_of(httpx.get(f"{worker}/metrics").text, name)


# --- what tests of the lifecycle wait for -------------------------------------------------------


def samples(url: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines())
    return {name: float(value) for name, _, value in lines if not name.startswith("#")}


def is_ready(cluster: Cluster, role: str) -> bool:
    ready = f'baton_workers{{model="tiny-chat",role="{role}",state="ready"}}'
    return samples(cluster.admin)[ready] == 1


def wait_until_whole(cluster: Cluster) -> None:
    for role in ("prefill", "decode", "both"):
        wait_for(functools.partial(is_ready, cluster, role), f"the {role} worker", START_S)
