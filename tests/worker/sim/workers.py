"""Simulated workers in threads of the test's process: over real sockets, and with their insides at hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.metrics import sum_of
from tests.waiting import LIMIT_S
from worker.sim.api import Sim, create_app
from worker.sim.server import SimServer, listen
from worker.sim.settings import Settings

MODEL = "sim-model"


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
        return sum_of(self.client.get("/metrics").text, name)

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
