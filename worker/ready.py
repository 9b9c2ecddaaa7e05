"""`GET /baton/ready`, `POST /baton/drain` and `POST /baton/undrain` on vLLM (`orchestrator/wire/load.py`)."""

from __future__ import annotations

import hmac
from argparse import Namespace
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.datastructures import State

from orchestrator.wire.load import DRAIN_PATH, READY_PATH, UNDRAIN_PATH
from worker.load import Figures, LegCounting, LoadMeter, Sender

ENGINE_KEY = "baton_load_engine"  # in the application's state: whose health is asked for
METER_KEY = "baton_meter"  # there as well: the `LoadMeter`, once there is an engine
KEYS_KEY = "baton_keys"  # there as well: one of these is to be shown, if there are any

SEVERAL = (
    "this server has several API processes, of which only one would hear of it: start it with"
    " --api-server-count 1, or drain it at each orchestrator"
)


def add_routes(app: FastAPI) -> None:
    app.add_middleware(LegCounting, meter=lambda: getattr(app.state, METER_KEY, None))
    app.add_api_route(READY_PATH, _ready, methods=["GET"], include_in_schema=False)
    app.add_api_route(DRAIN_PATH, _drain, methods=["POST"], include_in_schema=False)
    app.add_api_route(UNDRAIN_PATH, _undrain, methods=["POST"], include_in_schema=False)


def begin(state: State, engine: Any, args: Namespace, environ: Mapping[str, str], meter: LoadMeter) -> None:
    """Let the routes answer for this engine."""
    setattr(state, ENGINE_KEY, engine)
    setattr(state, KEYS_KEY, _keys(args, environ))
    setattr(state, METER_KEY, meter)


def reported(meter: LoadMeter, sender: Sender, status: HTTPStatus | None = None) -> Response:
    """Answer with the report. Without a `status` it says whether new legs are wanted."""
    report = meter.report(sender)
    if status is None:
        status = HTTPStatus.SERVICE_UNAVAILABLE if report.is_draining else HTTPStatus.OK
    return Response(msgspec.json.encode(report), status, media_type="application/json")


async def _ready(request: Request) -> Response:
    meter = _meter(request)
    try:
        await getattr(request.app.state, ENGINE_KEY).check_health()
    except Exception as error:  # an engine that is dead: vLLM's own page answers the same
        raise HTTPException(503, f"the engine is not well: {type(error).__name__}") from error
    sender = Sender.of(request.headers.raw)
    meter.note_asked(sender)
    return reported(meter, sender)


async def _drain(request: Request) -> Response:
    meter = _changed(request)
    meter.drain()
    return reported(meter, Sender.of(request.headers.raw), HTTPStatus.ACCEPTED)


async def _undrain(request: Request) -> Response:
    meter = _changed(request)
    meter.undrain()
    return reported(meter, Sender.of(request.headers.raw), HTTPStatus.ACCEPTED)


def _meter(request: Request) -> LoadMeter:
    meter: LoadMeter | None = getattr(request.app.state, METER_KEY, None)
    if meter is None:
        raise HTTPException(404, "this server has no engine")
    return meter


def _changed(request: Request) -> LoadMeter:
    """Return the meter for somebody who may change what it reports. Raises `HTTPException`."""
    meter = _meter(request)
    keys: list[bytes] = getattr(request.app.state, KEYS_KEY)
    if keys and not _shows_one(request.headers.get("authorization", ""), keys):
        raise HTTPException(401, "Unauthorized")
    if not meter.is_whole:
        raise HTTPException(501, SEVERAL)
    return meter


def _keys(args: Namespace, environ: Mapping[str, str]) -> list[bytes]:
    """Return the keys that vLLM (0.32) asks for below `/v1`: the options go before the variable."""
    given: Iterable[str] = getattr(args, "api_key", None) or [environ.get("VLLM_API_KEY", "")]
    return [key.encode() for key in given if key]


def _shows_one(authorization: str, keys: Iterable[bytes]) -> bool:
    scheme, _, key = authorization.partition(" ")
    shown = key.encode()
    return scheme.lower() == "bearer" and any(hmac.compare_digest(shown, each) for each in keys)


# --- what vLLM's engine has to do ---------------------------------------------------------------


class EngineFigures:
    """These are the figures of vLLM's V1 engine (0.32), as its own metrics have them.

    How many requests there are is asked of the API server, which knows it at once; how many of them wait, and
    how full the KV cache is, of the metrics, which are as of the engine's last step.
    """

    def __init__(self, engine: Any, config: Any, engines: int | None) -> None:
        """`engine` is the `AsyncLLM`, `config` its `VllmConfig`; `engines` are behind this server."""
        self._engine = engine
        self._engines = engines or 1
        self._seats = getattr(getattr(config, "scheduler_config", None), "max_num_seqs", None)

    def __call__(self, rank: int | None) -> Figures:
        states = list(getattr(getattr(self._engine, "output_processor", None), "request_states", {}).values())
        tokens = sum(getattr(state, "prompt_len", 0) or 0 for state in states)
        waiting = int(sum(self._gauge("gauge_scheduler_waiting", rank)))
        if rank is None:
            running, engines = max(len(states) - waiting, 0), self._engines
            waiting = len(states) - running
        else:
            running, engines = int(sum(self._gauge("gauge_scheduler_running", rank))), 1
            tokens //= self._engines
        kv = max(self._gauge("gauge_kv_cache_usage", rank), default=0.0)
        seats = None if self._seats is None else self._seats * engines
        return Figures(running, waiting, tokens, kv, seats)

    def _gauge(self, name: str, rank: int | None) -> list[float]:
        """Return the values of a gauge by engine; none where vLLM keeps no statistics."""
        loggers = getattr(getattr(self._engine, "logger_manager", None), "stat_loggers", ())
        gauges: dict[int, Any] = next((getattr(each, name) for each in loggers if hasattr(each, name)), {})
        return [gauge._value.get() for index, gauge in gauges.items() if rank is None or index == rank]
