"""What pages see, without anything that runs, and a client of theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import httpx
from fastapi import FastAPI

from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.keys import Key, KeyRing
from orchestrator.config.options import Config
from orchestrator.control.state import (
    FoundRequests,
    ProcessEnd,
    ProcessState,
    ProcessStatus,
    RouteAnswer,
    RouteQuestion,
)
from orchestrator.control.worker_watch import WorkerWatch
from orchestrator.http.ids import IdSource
from orchestrator.http.tls import Certificate
from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.figures import CELLS
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.tenants import KeyCounts
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.info import Streams, WorkerInfo
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import registry_of

CONFIG = Config.model_validate(
    {
        "models": [
            {"name": "tiny", "path": "p", "prefill": {"replicas": 1}, "decode": {"replicas": 1}},
            {"name": "org/large", "path": "p", "both": {"replicas": 1}},
        ]
    }
)
RING = KeyRing([Key("alice", sha256(b"s3cret").digest(), frozenset({"infer", "metrics", "admin"}))])
KEY = {"authorization": "Bearer s3cret"}


def worker(name: str, max_model_len: int | None, info: WorkerInfo | None = None) -> WorkerStatus:
    model, role, _ = name.rsplit("/", 2)
    address = WorkerAddress(name, model, model, role, "http://h:1", "h", 1, None, False)  # type: ignore[arg-type]
    return WorkerStatus(address, WorkerState.READY, 2, info, max_model_len, None)


INFO = WorkerInfo(role="decode", model="tiny", decodes=["json"], engine="sim", engine_version="1")


def a_telemetry() -> Telemetry:
    return Telemetry(Layout([model.name for model in CONFIG.models], ["/v1/completions"]))


@dataclass
class FakeState:
    keys: KeyRing | None = None
    problems: Mapping[str, str | None] = field(default_factory=lambda: {"tiny": None, "org/large": None})
    statuses: list[WorkerStatus] = field(
        default_factory=lambda: [worker("tiny/prefill/0", 4096), worker("tiny/decode/0", 2048, INFO)]
    )
    telemetry: Telemetry = field(default_factory=a_telemetry)
    config: Config = CONFIG
    certificate: Certificate | None = None
    index: int = 3
    transport: str = "orjson"
    streams: Streams = "http"
    is_draining: bool = False
    started: float = field(default_factory=lambda: time.time() - 100)
    ids: IdSource = field(default_factory=lambda: IdSource(Random(1)))
    events: Events = field(default_factory=Events)
    registry: Registry = field(default_factory=lambda: registry_of({"prefill": 1, "decode": 2}))

    def __post_init__(self) -> None:
        self.watch = WorkerWatch(self.config, self.registry, lambda slot: (0,) * CELLS, self.events)
        self.lag = LoopLagMonitor(self.telemetry)
        self.layout = self.telemetry.layout

    def counts(self) -> Sequence[int]:
        return self.telemetry.row

    def keys_counted(self) -> Sequence[KeyCounts]:
        return []

    def workers(self) -> list[WorkerStatus]:
        return self.statuses

    def upstream(self) -> UpstreamStats:
        return UpstreamStats(1, 2, 3, 4, 5)

    def model_problems(self) -> Mapping[str, str | None]:
        return self.problems

    def processes(self) -> list[ProcessStatus]:
        return [ProcessStatus(0, 71, ProcessState.SERVING, 5)]

    async def requests(self, query: RequestQuery) -> FoundRequests:
        return FoundRequests([], [])

    async def explain(self, question: RouteQuestion) -> RouteAnswer:
        raise NotImplementedError

    def process_ends(self) -> Mapping[ProcessEnd, int]:
        return {ProcessEnd.DIED: 2}


def ask(
    app: FastAPI,
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: object = None,
) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
            return await client.request(method, path, headers=headers, json=body)

    return asyncio.run(request())


def error_code(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return str(error["code"])
