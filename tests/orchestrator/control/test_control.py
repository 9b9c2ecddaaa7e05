import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import __version__
from orchestrator.compiled import is_compiled
from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.keys import Key, KeyRing
from orchestrator.config.options import Config
from orchestrator.control.admin import admin_app
from orchestrator.control.public import control_app
from orchestrator.control.state import ProcessEnd, ProcessState, ProcessStatus
from orchestrator.http.ids import IdSource
from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import registry_of
from tests.orchestrator.records import request_record

CONFIG = Config.model_validate(
    {
        "models": [
            {"name": "tiny", "path": "p", "prefill": {"replicas": 1}, "decode": {"replicas": 1}},
            {"name": "org/large", "path": "p", "both": {"replicas": 1}},
        ]
    }
)
RING = KeyRing([Key("alice", sha256(b"s3cret").digest())])
KEY = {"authorization": "Bearer s3cret"}

Build = Callable[["FakeState"], FastAPI]


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
    index: int = 3
    transport: str = "orjson"
    is_draining: bool = False
    started: float = field(default_factory=lambda: time.time() - 100)
    ids: IdSource = field(default_factory=lambda: IdSource(Random(1)))
    registry: Registry = field(default_factory=lambda: registry_of({"prefill": 1, "decode": 2}))

    def __post_init__(self) -> None:
        self.lag = LoopLagMonitor(self.telemetry)
        self.layout = self.telemetry.layout

    def counts(self) -> Sequence[int]:
        return self.telemetry.row

    def workers(self) -> list[WorkerStatus]:
        return self.statuses

    def upstream(self) -> UpstreamStats:
        return UpstreamStats(1, 2, 3, 4, 5)

    def model_problems(self) -> Mapping[str, str | None]:
        return self.problems

    def processes(self) -> list[ProcessStatus]:
        return [ProcessStatus(0, 71, ProcessState.SERVING, 5)]

    def ends(self) -> Mapping[ProcessEnd, int]:
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


# --- health -------------------------------------------------------------------------------------


def test_health_says_that_the_process_is_up_even_without_workers() -> None:
    app = control_app(FakeState(problems={"tiny": "no worker"}, statuses=[]))
    response = ask(app, "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_verbose_health_has_figures() -> None:
    state = FakeState()
    state.lag.note(0.25)
    state.lag.note(0.125)
    state.telemetry.begin(request_record())
    figures = ask(control_app(state), "/health?verbose").json()
    assert figures.pop("uptime_s") >= 100
    assert figures.pop("rss_bytes") > 1 << 20
    assert figures.pop("pid") == os.getpid()
    assert figures == {
        "status": "ok",
        "version": __version__,
        "form": "compiled" if is_compiled() else "pure",
        "transport": "orjson",
        "event_loop": "asyncio",
        "http_parser": "httptools",
        "process": 3,
        "loop_lag_ms": {"last": 125.0, "max": 250.0},
        "in_flight": 1,
        "tasks": 1,
    }


def test_ready_when_every_model_has_a_whole_path() -> None:
    response = ask(control_app(FakeState()), "/ready")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "models": {"tiny": None, "org/large": None}}


def test_not_ready_tells_why_for_each_model() -> None:
    problems = {"tiny": None, "org/large": "no decode worker is ready"}
    response = ask(control_app(FakeState(problems=problems)), "/ready")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json() == {"status": "not ready", "models": problems}


def test_version() -> None:
    assert ask(control_app(FakeState()), "/version").json() == {"version": __version__}


def test_a_balancer_may_ask_with_head() -> None:
    response = ask(control_app(FakeState()), "/health", "HEAD")
    assert response.status_code == 200


# --- models -------------------------------------------------------------------------------------


def test_models_are_listed_with_the_shortest_length_of_their_workers() -> None:
    state = FakeState()
    body = ask(control_app(state), "/v1/models").json()
    common = {"object": "model", "created": int(state.started), "owned_by": "baton"}
    assert body == {
        "object": "list",
        "data": [
            {"id": "tiny", "max_model_len": 2048, **common},
            {"id": "org/large", "max_model_len": None, **common},
        ],
    }


def test_one_model_may_have_a_slash_in_its_name() -> None:
    assert ask(control_app(FakeState()), "/v1/models/org/large").json()["id"] == "org/large"


def test_an_unknown_model_is_404_with_the_known_names() -> None:
    response = ask(control_app(FakeState()), "/v1/models/other")
    assert (response.status_code, error_code(response)) == (404, "model_not_found")
    assert "tiny, org/large" in response.json()["error"]["message"]


# --- docs ---------------------------------------------------------------------------------------


def test_the_schema_describes_the_data_plane_too() -> None:
    app = control_app(FakeState())
    document = ask(app, "/openapi.json").json()
    assert set(document["paths"]) == {
        "/health",
        "/ready",
        "/version",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/completions",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["required"] == ["model", "messages"]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert ask(app, "/openapi.json").json() == document


def test_the_docs_page_is_there() -> None:
    assert "/openapi.json" in ask(control_app(FakeState()), "/docs").text


# --- errors and ids -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/nothing", "/health/", "/v1/models/", "/redoc", "/metrics", "/v1"])
def test_what_does_not_exist_is_an_openai_error(path: str) -> None:
    response = ask(control_app(FakeState()), path)
    assert response.status_code == 404
    assert error_code(response) in ("not_found", "model_not_found")


def test_a_method_that_is_not_served_is_405_with_those_that_are() -> None:
    response = ask(control_app(FakeState()), "/v1/models", "POST")
    assert (response.status_code, error_code(response)) == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_a_bug_of_ours_is_a_500_with_an_id_and_a_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeState):
        def model_problems(self) -> Mapping[str, str | None]:
            raise RuntimeError("details that a client must not see")

    response = ask(control_app(Broken()), "/ready", headers={"x-request-id": "mine"})
    assert (response.status_code, error_code(response)) == (500, "internal_error")
    assert "details" not in response.text
    assert response.headers["x-request-id"] == "mine"
    [record] = caplog.records
    assert "mine" in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize("build", [control_app, admin_app])
@pytest.mark.parametrize("path", ["/health", "/nothing", "/metrics"])
def test_every_answer_has_an_id(build: Build, path: str) -> None:
    app = build(FakeState())
    assert ask(app, path, headers={"x-request-id": "a.B-1"}).headers["x-request-id"] == "a.B-1"
    fresh = [ask(app, path, headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b")]
    assert all(one.startswith("req-") for one in fresh)
    assert len(set(fresh)) == 2


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/health?verbose", "/ready", "/version"])
def test_probes_need_no_key(path: str) -> None:
    assert ask(control_app(FakeState(keys=RING)), path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/docs", "/openapi.json", "/nothing"])
def test_everything_else_needs_one(path: str) -> None:
    app = control_app(FakeState(keys=RING))
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = ask(app, path, headers=headers)
        assert (response.status_code, error_code(response)) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert ask(app, path, headers=KEY).status_code == (404 if path == "/nothing" else 200)


@pytest.mark.parametrize("path", ["/", "/metrics", "/admin/workers", "/health"])
def test_nothing_of_the_admin_api_is_open_when_there_are_keys(path: str) -> None:
    app = admin_app(FakeState(keys=RING))
    assert ask(app, path).status_code == 401
    assert ask(app, path, headers=KEY).status_code == (404 if path == "/health" else 200)


# --- the admin API ------------------------------------------------------------------------------


def test_metrics_are_prometheus_text() -> None:
    response = ask(admin_app(FakeState()), "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    [info] = families["baton_info"].samples
    assert info.labels["event_loop"] == "asyncio"
    assert "process_resident_memory_bytes" in families
    assert len(families["baton_worker_in_flight"].samples) == 2


def test_processes_are_listed() -> None:
    answer = ask(admin_app(FakeState()), "/admin/processes").json()
    assert answer == [{"index": 0, "pid": 71, "state": "serving", "in_flight": 5}]


def test_the_index_names_the_pages() -> None:
    text = ask(admin_app(FakeState()), "/").text
    assert "/metrics" in text
    assert "/admin/workers" in text
    assert "/admin/processes" in text


def test_admin_has_no_docs() -> None:
    assert ask(admin_app(FakeState()), "/openapi.json").status_code == 404
