"""A cluster of simulated workers under `baton up`, the commands that look at it, and a load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.shared.processes import free_port
from tests.waiting import running_with, wait_for

ROOT = Path(__file__).resolve().parents[3]
SIM = {"decode_ms_per_token": 5, "prefill_us_per_token": 20, "transfer_us_per_token": 2}


class Cluster:
    """`baton up` on free ports in a directory of its own; `commands` are run there."""

    def __init__(
        self,
        directory: Path,
        *,
        prefill: int | dict[str, Any] = 1,
        decode: int | dict[str, Any] = 1,
        replicas: int = 1,
        scaling: dict[str, Any] | None = None,
        **orchestrator: Any,
    ) -> None:
        """A pool is so many workers on ports of their own, or what its section holds beside the engine."""
        self.directory = directory
        self.listen, self.admin = (f"127.0.0.1:{port}" for port in _own_ports(replicas))
        self.config = directory / f"c{free_port()}.yaml"  # its name finds the processes
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(directory / "state")}
        self.env.pop("BATON_ADMIN_KEY", None)
        document = {
            "orchestrator": {"listen": self.listen, "admin": self.admin, **orchestrator},
            "models": [{"name": "sim", "prefill": _pool(prefill), "decode": _pool(decode)}],
            "health": {"interval_s": 0.2},
            "launch": {"orchestrators": replicas},
            "scaling": scaling,
            "base_port": free_port() + 10_000,  # of workers that are added: where no test has ports
        }
        self.config.write_text(json.dumps(document))
        self.up: subprocess.Popen[str] | None = None

    def start(self, **environ: str) -> None:
        """Start it, and wait until it is ready."""
        with (self.directory / f"{self.config.stem}.stderr").open("w") as stderr:
            self.up = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "up", str(self.config)],
                cwd=self.directory,
                env=self.env | environ,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        assert self.up.stdout is not None
        assert self.up.stdout.readline(), self.stderr

    @property
    def stderr(self) -> str:
        return (self.directory / f"{self.config.stem}.stderr").read_text()

    @property
    def run(self) -> Path:
        """The directory of the latest run."""
        return max((self.directory / ".baton").iterdir())

    def stop(self) -> None:
        if self.up is None:
            return
        if self.up.poll() is None:
            self.up.terminate()
        self.up.wait(timeout=100)
        assert self.up.stdout is not None
        self.up.stdout.close()
        wait_for(lambda: not running_with(str(self.config)), "the end of all processes")

    # --- commands -------------------------------------------------------------------------------

    def popen(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=self.directory,
            env=self.env | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.popen(*words, **environ)
        out, err = process.communicate(timeout=110)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words: str, **environ: str) -> Any:
        done = self.command(*words, "-o", "json", **environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of `baton ps` by name."""
        return {row["name"]: row for row in self.json("ps")["rows"]}

    def workers(self) -> dict[str, str]:
        """The states of all workers, as the orchestrator sees them."""
        found = httpx.get(f"http://{self.admin}/admin/workers", trust_env=False).json()
        return {row["address"]["name"]: row["state"] for row in found}

    def ask(self, **more: Any) -> httpx.Response:
        body = {"model": "sim", "prompt": "What is prefill?", "max_tokens": 8} | more
        return httpx.post(f"http://{self.listen}/v1/completions", json=body, timeout=60, trust_env=False)


def _own_ports(replicas: int) -> tuple[int, int]:
    """Ports of the first orchestrator; where there are further ones, theirs are where no test has any."""
    if replicas == 1:
        return free_port(), free_port()
    first = free_port() + 10_000
    return first, first + 1


def _pool(replicas: int | dict[str, Any]) -> dict[str, Any]:
    if not isinstance(replicas, int):
        return {"engine": "sim", "sim": SIM, **replicas}
    workers = [{"port": free_port(), "side_channel_port": free_port()} for _ in range(replicas)]
    return {"engine": "sim", "workers": workers, "sim": SIM}


@contextmanager
def running(cluster: Cluster, **environ: str) -> Iterator[Cluster]:
    try:
        cluster.start(**environ)
        yield cluster
    finally:
        cluster.stop()


# --- load -----------------------------------------------------------------------------------------


@dataclass
class Load:
    """Clients ask without end, some for streams."""

    cluster: Cluster
    answered: int = 0
    streamed: int = 0
    failures: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        with httpx.Client(base_url=f"http://{self.cluster.listen}", timeout=60, trust_env=False) as client:
            while not self.is_over.is_set():
                try:
                    self._whole(client) if number % 2 else self._stream(client)
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(repr(error))

    def _body(self, **more: Any) -> dict[str, Any]:
        return {
            "model": "sim",
            "prompt": "What is prefill? " * 8,
            "max_tokens": 24,
            "ignore_eos": True,
            **more,
        }

    def _whole(self, client: httpx.Client) -> None:
        answer = client.post("/v1/completions", json=self._body())
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length", answer.text
        self.answered += 1

    def _stream(self, client: httpx.Client) -> None:
        with client.stream("POST", "/v1/completions", json=self._body(stream=True)) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 200, lines
        assert lines[-1] == "data: [DONE]", lines
        assert not any('"error"' in line for line in lines), lines
        self.streamed += 1


@contextmanager
def loaded(cluster: Cluster, clients: int = 6) -> Iterator[Load]:
    """Have some clients ask while this is entered; after that nothing is under way."""
    load = Load(cluster)
    threads = [threading.Thread(target=load.ask, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: load.failures or (load.answered and load.streamed), "the first answers")
        assert not load.failures, load.failures
        yield load
    finally:
        load.is_over.set()
        for thread in threads:
            thread.join()
