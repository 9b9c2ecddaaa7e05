"""Orchestrators as real processes, in front of real simulated workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.processes import free_port
from orchestrator.config.options import DEFAULT_SEATS
from tests import reaper
from tests.waiting import wait_for

MODEL = "m"
PATIENCE_S = 60.0
Counters = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextlib.contextmanager
def simulated(*roles: str, options: Sequence[str] = ()) -> Iterator[list[SimWorker]]:
    """Workers of these roles, ready."""
    workers = [SimWorker(role, options) for role in roles]
    try:
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.kill()


class SimWorker:
    def __init__(self, role: str, options: Sequence[str]) -> None:
        self.role = role
        self._options = options
        self._start(port=0)

    def _start(self, port: int) -> None:
        command = [sys.executable, "-m", "worker.sim", "--model-name", MODEL, "--role", self.role]
        self._process = subprocess.Popen(
            [*command, "--port", str(port), *self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().removeprefix("ready: ").strip()

    def restart(self) -> None:
        """Where it was; another engine, ready."""
        self.kill()
        self._start(int(self.url.rpartition(":")[2]))
        self.wait_ready()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Stream:
    """A streamed answer that has begun."""

    def __init__(self, client: httpx.Client, tokens: int) -> None:
        """On the client's idle connection, if it has one."""
        self._client = client
        body = {"model": MODEL, "prompt": "Go on", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        request = client.build_request("POST", "/v1/completions", json=body)
        self._answer = client.send(request, stream=True)
        assert self._answer.status_code == 200

    def is_whole(self) -> bool:
        """Read it to its end, which is as it should be or not."""
        try:
            events = self._answer.read()
        except httpx.TransportError:
            return False
        return events.endswith(b"data: [DONE]\n\n") and b'data: {"error"' not in events

    def error_code(self) -> str:
        """Read it to its end, of which an error is the last event."""
        *_, error, done, _ = self._answer.read().split(b"\n\n")
        assert done == b"data: [DONE]"
        code: str = json.loads(error.removeprefix(b"data: "))["error"]["code"]
        return code

    def leave(self) -> None:
        self._client.close()


class Orchestrator:
    """`baton orchestrator`, of two processes if not told otherwise; `clean_up` must be called at the end."""

    def __init__(
        self,
        directory: Path,
        workers: Sequence[SimWorker],
        *,
        trust: ssl.SSLContext | bool = True,
        env: Mapping[str, str] | None = None,
        key: str = "",
        routing: Mapping[str, Any] | None = None,
        seats: int = DEFAULT_SEATS,
        pool: Mapping[str, Any] | None = None,
        before: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """`before` becomes the orchestrator. `seats` are those of a decode worker, `pool` is in the config of
        both roles; `options` are its `orchestrator`. `trust` is for its certificate, `key` for who asks.
        """
        self._asking: dict[str, Any] = {
            "headers": {"authorization": f"Bearer {key}"} if key else {},
            "timeout": PATIENCE_S,
            "trust_env": False,
            "verify": trust,
        }
        self._clients: list[httpx.Client] = []
        self.count = options.setdefault("processes", 2)
        self._marker = uuid4().hex  # in the environment of every process that comes from here
        self._directory = directory
        listen, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        scheme = "https" if "tls" in options else "http"
        self.url, self.admin_url = f"{scheme}://{listen}", f"{scheme}://{admin}"
        pools = {role: {**_urls(workers, role, pool or {}), **(pool or {})} for role in ("prefill", "decode")}
        decode = {**pools["decode"], "seats": seats}
        self.config: dict[str, Any] = {
            "orchestrator": {"listen": listen, "admin": admin, **options},
            "models": [{"name": MODEL, "prefill": pools["prefill"], "decode": decode}],
            "routing": dict(routing or {}),
        }
        self._config_file = directory / "config.yaml"
        self.write_config()
        self._stderr = (directory / "stderr").open("wb")
        self._command = [*before, sys.executable, "-m", "launch.cli", "orchestrator", str(self._config_file)]
        self._env = {**os.environ, **(env or {}), "BATON_TEST": self._marker}
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._env, stderr=self._stderr, start_new_session=True)

    def restart(self) -> None:
        """End it as an operator does, and start it again where it was."""
        self.signal(signal.SIGTERM)
        assert self.wait_exit() == 0, self.lines
        self.process = self._started()
        self.wait_ready()

    def write_config(self, text: str | None = None) -> None:
        """Put `config`, or something else, into the file that a reload reads."""
        self._config_file.write_text(text or json.dumps(self.config))

    @property
    def lines(self) -> str:
        return (self._directory / "stderr").read_text()

    # --- asking ---------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        wait_for(
            lambda: self._is_ready() and len(self.serving()) == self.count, "all processes, and a whole path"
        )

    def readiness(self) -> str:
        """What /ready says, on a fresh connection."""
        status: str = self._get(f"{self.url}/ready").json()["status"]
        return status

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.lines
        try:
            return self._get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def admin(self, path: str) -> httpx.Response:
        answer = self._get(self.admin_url + path)
        assert answer.status_code == 200
        return answer

    def _get(self, url: str) -> httpx.Response:
        return httpx.get(url, **self._asking)

    def processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.admin("/admin/processes").json()
        return found

    def serving(self) -> list[dict[str, Any]]:
        """In the order of their places."""
        found = [process for process in self.processes() if process["state"] == "serving"]
        return sorted(found, key=lambda process: int(process["index"]))

    def change(self, method: str, path: str, body: object = None) -> None:
        """Ask the admin API for something else than to look."""
        answer = httpx.request(method, self.admin_url + path, json=body, **self._asking)
        assert answer.is_success, answer.text

    def worker_states(self) -> dict[str, str]:
        return {worker["address"]["name"]: worker["state"] for worker in self.admin("/admin/workers").json()}

    def worker_loads(self) -> dict[str, int]:
        return {
            worker["address"]["name"]: worker["in_flight"] for worker in self.admin("/admin/workers").json()
        }

    def counters(self) -> Counters:
        """Every series of /metrics that only grows, but for the supervisor's own process."""
        families = text_string_to_metric_families(self.admin("/metrics").text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            if family.type in ("counter", "histogram") and family.name.startswith("baton")
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def gauge(self, name: str) -> float:
        """The sum of all series of that name."""
        families = text_string_to_metric_families(self.admin("/metrics").text)
        return sum(sample.value for family in families if family.name == name for sample in family.samples)

    def answered(self) -> float:
        """Completions with status 200, of all processes ever."""
        labels = {"model": MODEL, "endpoint": "/v1/completions", "code": "200"}
        return self.counters()["baton_requests_total", tuple(sorted(labels.items()))]

    def client(self) -> httpx.Client:
        """With connections of its own; closed at the end of the test."""
        limits = httpx.Limits(keepalive_expiry=None)  # the server ends idle connections
        made = httpx.Client(base_url=self.url, limits=limits, **self._asking)
        self._clients.append(made)
        return made

    def client_of_each(self) -> list[httpx.Client]:
        """Clients with an idle connection to each process, in the order of their places."""
        found: dict[int, httpx.Client] = {}

        def are_all_found() -> bool:
            client = self.client()
            index = client.get("/health?verbose").json()["process"]
            if found.setdefault(index, client) is not client:
                client.close()
            return len(found) == self.count

        wait_for(are_all_found, "a connection to each process")
        return [found[index] for index in sorted(found)]

    def streams(self, tokens: int) -> list[Stream]:
        """Streams, two of them on each process."""
        clients = [*self.client_of_each(), *self.client_of_each()]
        return [Stream(client, tokens) for client in clients]

    # --- ending ---------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_exit(self) -> int:
        return self.process.wait(PATIENCE_S)

    def left(self) -> set[int]:
        """What runs of all that was ever started."""
        return reaper.marked(self._marker)

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr.close()
        for client in self._clients:
            client.close()
        wait_for(lambda: not self.left(), "the end of all processes")


def _urls(workers: Sequence[SimWorker], role: str, pool: Mapping[str, Any]) -> dict[str, Any]:
    return {} if "discover" in pool else {"urls": [w.url for w in workers if w.role == role]}


class CounterWatch:
    """Looks at all counters again and again, for as long as it is entered; none may have fallen."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.looks = 0
        self.fallen: list[tuple[str, Mapping[str, str], float, float]] = []

    def __enter__(self) -> CounterWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        before = self._orchestrator.counters()
        while not self._is_over.is_set():
            now = self._orchestrator.counters()
            for name, labels in before:
                old, new = before[name, labels], now[name, labels]
                if new < old:
                    self.fallen.append((name, dict(labels), old, new))
            before = now
            self.looks += 1


@contextlib.contextmanager
def starting(directory: Path, workers: list[SimWorker]) -> Iterator[Callable[..., Orchestrator]]:
    """A function that starts orchestrators and waits for them; at the end none leaves a process behind."""
    made: list[Orchestrator] = []

    def start(**options: Any) -> Orchestrator:
        made.append(Orchestrator(directory, options.pop("workers", workers), **options))
        made[-1].wait_ready()
        return made[-1]

    try:
        yield start
    finally:
        for orchestrator in made:
            orchestrator.clean_up()
