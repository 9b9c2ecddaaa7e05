"""Simulated workers in threads of the test's process: over real sockets, and with their insides at hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from worker.sim.api import Sim, create_app
from worker.sim.server import SimServer, listen
from worker.sim.settings import Settings

LIMIT_S = 60.0  # how long to wait for what must happen; a slow machine is no failure
MODEL = "sim-model"

T = TypeVar("T")


class Worker:
    """A running worker. `sim` is touched by its thread: read single values only."""

    def __init__(self, url: str, sim: Sim) -> None:
        self.url = url
        self.sim = sim
        self.client = httpx.Client(base_url=url, timeout=LIMIT_S)

    def post(self, path: str, document: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=document, headers=headers)

    def ledger(self) -> dict[str, Any]:
        return dict(self.client.get("/sim/ledger").json())

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0] == name)

    def add_fault(self, kind: str, **fields: Any) -> None:
        self.client.post("/sim/faults", json={"kind": kind, **fields}).raise_for_status()


@contextmanager
def running(**settings: Any) -> Iterator[Worker]:
    """A worker with these settings, until the block ends."""
    app = create_app(Settings(**({"model_name": MODEL} | settings)))
    ready = threading.Event()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server = SimServer(app, listen("127.0.0.1", 0), on_ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(LIMIT_S)
        worker = Worker(urls[0], app.state.sim)
        with worker.client:
            yield worker
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], T], what: str) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for: {what}"
        time.sleep(0.01)
    return value
