"""Runs of `baton up --on ray`, with requests beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.shared.processes import free_port
from tests.waiting import running_with, wait_for

ROOT = Path(__file__).parents[4]
BATON = (sys.executable, "-m", "launch.cli")
START_S = 120.0


class Nodes:
    """The process of `nodes.py`."""

    def __init__(self, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.backends.ray.nodes", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.address: str = self._answer()["address"]

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@dataclass
class Run:
    """One `baton up`, in a directory of its own."""

    folder: Path
    address: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pools: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        (self.folder / "c.yaml").write_text(yaml.safe_dump(self._config()))
        self._errors = (self.folder / "stderr").open("wb")
        self.process = subprocess.Popen(
            [*BATON, "up", "--on", "ray", "c.yaml"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self.folder,
            env=_environ(),
            text=True,
        )

    def _config(self) -> dict[str, Any]:
        pool = {"engine": "sim", "replicas": 2}
        pools = self.pools or {"prefill": pool, "decode": pool}
        return {
            "orchestrator": {
                "listen": self.url.removeprefix("http://"),
                "admin": f"127.0.0.1:{free_port()}",
            },
            "models": [{"name": "sim", **pools}],
            "launch": {
                "ray": {"address": self.address, "cpus": 1, **self.options},
                "start_timeout_s": START_S,
            },
        }

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"ready: {self.url}\n", self.stderr

    def ask(self, *words: str, code: int = 0) -> str:
        """Run a command of ours for this run, and return what it prints."""
        done = subprocess.run(
            [*BATON, *words], cwd=self.folder, env=_environ(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def rows(self) -> list[dict[str, Any]]:
        """The workers, as `baton ps` lists them."""
        rows = json.loads(self.ask("ps", "-o", "json"))["rows"]
        return [row for row in rows if row["role"] != "orchestrator"]

    def wait_whole(self, count: int = 4) -> list[dict[str, Any]]:
        """Wait until so many workers serve, and return their rows."""
        return wait_for(lambda: self._serving(count), f"{count} workers that serve", START_S)

    def _serving(self, count: int) -> list[dict[str, Any]]:
        rows = self.rows()
        serving = [row for row in rows if row["state"] == row["process_state"] == "ready"]
        return serving if len(rows) == len(serving) == count else []

    def engine(self, url: str) -> int:
        """The process of a worker."""
        port = url.rpartition(":")[2]
        (found,) = running_with(f"--port\0{port}\0")
        return found

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def directory(self) -> Path:
        (found,) = (self.folder / ".baton").glob("run-*")
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass
class Load:
    """Requests under way all the time, each a stream."""

    served: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[Load]:
    """Send requests until the block ends; the last ones are waited for."""
    told, stop = Load(), threading.Event()
    threads = [threading.Thread(target=_ask, args=(url, told, stop)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _ask(url: str, told: Load, stop: threading.Event) -> None:
    with httpx.Client(timeout=60, trust_env=False) as client:
        while not stop.is_set():
            try:
                answer = chat(client, url)
                is_whole = (
                    answer.status_code == 200 and "[DONE]" in answer.text and '"error"' not in answer.text
                )
                if is_whole:
                    told.served += 1
                else:
                    told.failed.append(f"{answer.status_code} {answer.text[-300:]}")
            except httpx.HTTPError as error:
                told.failed.append(repr(error))
            time.sleep(0.02)


def chat(client: httpx.Client, url: str) -> httpx.Response:
    question = {"role": "user", "content": "What is prefill? " * 20}
    body = {"model": "sim", "messages": [question], "max_tokens": 30, "stream": True}
    return client.post(f"{url}/v1/chat/completions", json=body)
