"""The routes beside vLLM's, without vLLM: its engine is a stand-in."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from tests.worker.asgi import Reply, call, get
from worker import ready
from worker.load import LoadMeter


class Gauge:
    def __init__(self, value: float) -> None:
        self._value = SimpleNamespace(get=lambda: value)


class Engine:
    """What our routes see of vLLM's `AsyncLLM`: five requests, of which two wait."""

    def __init__(self) -> None:
        self.is_dead = False
        self.output_processor = SimpleNamespace(
            request_states={name: SimpleNamespace(prompt_len=10) for name in "abcde"}
        )
        gauges = {
            "gauge_scheduler_running": {0: Gauge(2.0), 1: Gauge(1.0)},
            "gauge_scheduler_waiting": {0: Gauge(0.0), 1: Gauge(2.0)},
            "gauge_kv_cache_usage": {0: Gauge(0.5), 1: Gauge(0.25)},
        }
        self.logger_manager: Any = SimpleNamespace(stat_loggers=[object(), SimpleNamespace(**gauges)])

    async def check_health(self) -> None:
        if self.is_dead:
            raise RuntimeError("EngineDeadError")


CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=32))


def app_of(
    engine: Engine | None, *, keys: list[str] | None = None, environ: Any = (), is_whole: bool = True
) -> FastAPI:
    app = FastAPI()
    ready.add_routes(app)
    if engine is not None:
        meter = LoadMeter(ready.EngineFigures(engine, CONFIG, 2), "r1", is_whole=is_whole)
        ready.begin(app.state, engine, Namespace(api_key=keys), dict(environ), meter)
    return app


def asked(app: FastAPI, method: str, path: str, **headers: str) -> Reply:
    return asyncio.run(
        call(app, method, path, [b""], {key.replace("_", "-"): headers[key] for key in headers})
    )


def test_the_figures_are_the_engines() -> None:
    report = get(app_of(Engine()), "/baton/ready").json()
    assert report == {
        "state": "serving",
        "revision": "r1",
        "running": 3,
        "waiting": 2,
        "prompt_tokens": 50,
        "kv": 0.5,
        "seats": 64,
        "others": 0,
        "senders": 0,
        "unaware": 0,
    }
    second = asked(app_of(Engine()), "GET", "/baton/ready", x_data_parallel_rank="1").json()
    assert [second[key] for key in ("running", "waiting", "prompt_tokens", "kv", "seats")] == [
        1,
        2,
        25,
        0.25,
        32,
    ]


def test_without_statistics_all_requests_run() -> None:
    engine = Engine()
    engine.logger_manager = None
    report = get(app_of(engine), "/baton/ready").json()
    assert (report["running"], report["waiting"], report["kv"]) == (5, 0, 0.0)


def test_there_is_nothing_to_report_before_there_is_an_engine() -> None:
    for method, path in (("GET", "/baton/ready"), ("POST", "/baton/drain"), ("POST", "/baton/undrain")):
        assert asked(app_of(None), method, path).status == 404


def test_a_dead_engine_is_not_ready_and_reports_nothing() -> None:
    engine = Engine()
    engine.is_dead = True
    reply = get(app_of(engine), "/baton/ready")
    assert reply.status == 503
    assert "state" not in reply.json()


@pytest.mark.parametrize("options", [{"keys": ["sesame"]}, {"environ": {"VLLM_API_KEY": "sesame"}}])
def test_draining_needs_the_key_that_vllm_wants(options: Any) -> None:
    app = app_of(Engine(), **options)
    for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic sesame"}):
        assert asked(app, "POST", "/baton/drain", **wrong).status == 401
    assert get(app, "/baton/ready").status == 200
    key = {"authorization": "Bearer sesame"}
    assert asked(app, "POST", "/baton/drain", **key).json()["state"] == "draining"
    assert (get(app, "/baton/ready").status, get(app, "/baton/ready").json()["running"]) == (503, 3)
    assert asked(app, "POST", "/baton/undrain", **key).status == 202
    assert get(app, "/baton/ready").status == 200


def test_one_process_of_several_cannot_drain_the_server() -> None:
    app = app_of(Engine(), is_whole=False)
    reply = asked(app, "POST", "/baton/drain")
    assert reply.status == 501
    assert "--api-server-count 1" in reply.json()["detail"]
    assert get(app, "/baton/ready").json()["others"] is None
