"""What docs/operating.md says is seen of each thing that happens: it is made to happen, and looked for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.processes import free_port
from tests.launch.operate.cluster import ROOT, Cluster, loaded, running
from tests.orchestrator.certificate import EXPIRED_CERT, RENEWED_KEY
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

HEAD = "| what happens | log | event | `/metrics` | `baton top` |"
SPAN = re.compile(r"`([^`]+)`")
VALUE = re.compile(r"`([a-z_]+)` (above 0|\d+)")


@dataclass(frozen=True)
class Row:
    """A row of the table: what is to be found where."""

    log: list[str]
    kinds: list[str]
    metrics: list[tuple[str, str]]  # names, and what their value is
    top: list[str]


def table() -> dict[str, Row]:
    lines = (ROOT / "docs/operating.md").read_text("utf-8").splitlines()
    start = lines.index(HEAD) + 2
    rows: dict[str, Row] = {}
    for line in lines[start:]:
        if not line.startswith("| "):
            break
        what, log, kinds, metrics, top = (cell.strip() for cell in line.split("|")[1:-1])
        rows[what] = Row(SPAN.findall(log), SPAN.findall(kinds), VALUE.findall(metrics), SPAN.findall(top))
    return rows


ROWS = table()
MADE: dict[str, Callable[..., Any]] = {}


def makes(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Name the row that a test is about."""

    def kept(test: Callable[..., Any]) -> Callable[..., Any]:
        MADE[what] = test
        return test

    return kept


# --- looking ------------------------------------------------------------------------------------


def get(cluster: Cluster, path: str, **headers: str) -> httpx.Response:
    answer = httpx.get(f"http://{cluster.admin}{path}", headers=headers, timeout=30, trust_env=False)
    return answer.raise_for_status()


def values(text: str, name: str, labels: Mapping[str, str]) -> list[float]:
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def is_so(found: list[float], wanted: str) -> bool:
    return any(value > 0 if wanted == "above 0" else value == float(wanted) for value in found)


@dataclass
class Looker:
    """It waits until a row holds. `labels` are of the samples, `line` is in the line of `top`."""

    cluster: Cluster
    what: str
    labels: Mapping[str, str]
    line: str = ""
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def wait(self) -> None:
        row = ROWS[self.what]
        for span in row.log:
            wait_for(lambda span=span: span in self._log(), f"the log to have {span}")
        for kind in row.kinds:
            wait_for(lambda kind=kind: kind in self._kinds(), f"the event {kind}")
        for name, wanted in row.metrics:
            wait_for(lambda name=name, wanted=wanted: is_so(self._values(name), wanted), f"{name} {wanted}")
        if row.top:
            wait_for(lambda: all(span in self._top() for span in row.top), f"{row.top} in top")

    def _log(self) -> str:
        lines = (self.cluster.run / "orchestrator.log").read_text()
        return f"{lines}\n{self.cluster.stderr}"

    def _kinds(self) -> list[str]:
        return [event["kind"] for event in get(self.cluster, "/admin/events", **self.headers).json()]

    def _values(self, name: str) -> list[float]:
        return values(get(self.cluster, "/metrics", **self.headers).text, name, self.labels)

    def _top(self) -> str:
        shown = self.cluster.command("top", "--once").stdout
        return "\n".join(line for line in shown.splitlines() if self.line in line)


@contextmanager
def cluster_of(tmp_path: Path, *, decode: int = 2, **orchestrator: Any) -> Iterator[Cluster]:
    with running(Cluster(tmp_path, prefill=1, decode=decode, **orchestrator)) as cluster:
        yield cluster


def look(cluster: Cluster, what: str, labels: Mapping[str, str], line: str = "") -> None:
    Looker(cluster, what, labels, line).wait()


WORKER = {"worker": "sim/decode/1"}

# --- what happens -------------------------------------------------------------------------------


@makes("a worker is killed")
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster, loaded(cluster, 2):
        os.kill(cluster.rows()["sim/decode/1"]["pid"], signal.SIGKILL)
        look(cluster, "a worker is killed", WORKER, "sim/decode/1")


@makes("a worker stands still")
def test_a_worker_that_stands_still(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        pid = cluster.rows()["sim/decode/1"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            look(cluster, "a worker stands still", WORKER, "sim/decode/1")
        finally:
            os.kill(pid, signal.SIGCONT)


@makes("a worker is 20 times slower")
def test_a_worker_that_is_slow(tmp_path: Path) -> None:
    with cluster_of(tmp_path, decode=3) as cluster:
        url = cluster.rows()["sim/decode/1"]["url"]
        fault = {"kind": "slow", "factor": 20.0}
        httpx.post(f"{url}/sim/faults", json=fault, trust_env=False).raise_for_status()
        with loaded(cluster, 6):
            look(cluster, "a worker is 20 times slower", WORKER, "sim/decode/1")


@makes("one key floods")
def test_a_key_that_floods(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    limits = {"loud": "infer rpm=3", "root": "admin"}
    lines = [f"{name} {sha256(name.encode()).hexdigest()} {words}\n" for name, words in limits.items()]
    keys.write_text("".join(lines))
    with cluster_of(tmp_path, api_keys_file=str(keys)) as cluster:
        url, body = (
            f"http://{cluster.listen}/v1/completions",
            {"model": "sim", "prompt": "Hi", "max_tokens": 1},
        )
        headers = {"authorization": "Bearer loud"}
        codes = [
            httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).status_code
            for _ in range(8)
        ]
        assert 429 in codes
        Looker(cluster, "one key floods", {"key": "loud"}, "loud", "root").wait()


@makes("a worker is drained")
def test_a_worker_that_is_drained(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        assert cluster.command("drain", "sim/decode/1").returncode == 0
        look(cluster, "a worker is drained", WORKER | {"state": "draining"}, "sim/decode/1")


def reload(cluster: Cluster, text: str) -> None:
    cluster.config.write_text(text)
    os.kill(cluster.rows()["orchestrator"]["pid"], signal.SIGHUP)


@makes("the config is reloaded")
@makes("a broken config is refused")
def test_configs_that_are_reloaded_and_refused(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        document = json.loads(cluster.config.read_text())
        reload(cluster, json.dumps(document | {"routing": {"decode": "round_robin"}}))
        look(cluster, "the config is reloaded", {"outcome": "applied"})
        reload(cluster, "models: [")
        look(cluster, "a broken config is refused", {"outcome": "refused"})


@makes("all workers are rolled")
def test_a_roll(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        assert cluster.command("restart", "--rolling").returncode == 0
        look(cluster, "all workers are rolled", WORKER, "sim/decode/1")


@makes("the orchestrator is killed")
def test_an_orchestrator_that_is_killed(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        assert cluster.ask().status_code == 200
        before = cluster.rows()["orchestrator"]["pid"]
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: cluster.rows()["orchestrator"]["pid"] != before, "another one")
        wait_for(lambda: cluster.rows()["orchestrator"]["state"] == "ready", "it to be ready")
        look(cluster, "the orchestrator is killed", {}, "orchestrator")


# --- without `baton up` -------------------------------------------------------------------------


@contextmanager
def orchestrator_alone(tmp_path: Path, stderr: str, **options: Any) -> Iterator[str]:
    """The address of the admin listener of an orchestrator that writes its log to the file `stderr`."""
    admin = f"127.0.0.1:{free_port()}"
    models = [{"name": "sim", "both": {"urls": [f"http://127.0.0.1:{free_port()}"]}}]
    document = {
        "orchestrator": {"listen": f"127.0.0.1:{free_port()}", "admin": admin, **options},
        "models": models,
    }
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(document))
    command = [sys.executable, "-m", "launch.cli", "orchestrator", str(config)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(stderr, "wb") as log, subprocess.Popen(command, stderr=log, env=env) as process:
        try:
            yield admin
        finally:
            process.terminate()
            process.wait(timeout=60)


def look_alone(url: str, what: str, log: Callable[[], str]) -> None:
    """Wait until a row holds that has nothing in `top`."""
    row = ROWS[what]
    assert not row.top

    def read(path: str) -> httpx.Response | None:
        try:
            return httpx.get(f"{url}{path}", verify=False, trust_env=False)  # noqa: S501  # it has expired
        except httpx.TransportError:
            return None  # it starts

    for kind in row.kinds:
        wait_for(lambda kind=kind: (found := read("/admin/events")) and kind in found.text, kind)
    for name, wanted in row.metrics:
        wait_for(
            lambda name=name, wanted=wanted: (
                (found := read("/metrics")) and is_so(values(found.text, name, {}), wanted)
            ),
            name,
        )
    for span in row.log:
        wait_for(lambda span=span: span in log(), span)


@makes("the disk is full")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with orchestrator_alone(tmp_path, "/dev/full") as admin:
        look_alone(f"http://{admin}", "the disk is full", lambda: "")


@makes("the certificate has expired")
def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tls = {"cert": str(EXPIRED_CERT), "key": str(RENEWED_KEY)}
    with orchestrator_alone(tmp_path, str(log), tls=tls) as admin:
        look_alone(f"https://{admin}", "the certificate has expired", log.read_text)


def test_every_row_is_made_by_a_test() -> None:
    assert MADE.keys() == ROWS.keys()
