"""Builds the orchestrator from its config, outside in and once, and runs it in the foreground."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
import uvloop

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.compiled import is_stale
from orchestrator.config.addresses import worker_addresses
from orchestrator.config.keys import KeyRing, load_keys
from orchestrator.config.options import Config, OrchestratorConfig
from orchestrator.control.metrics import ProcessEnd, ProcessState, ProcessStatus
from orchestrator.control.public import admin_app, control_app
from orchestrator.control.reload import ConfigSource, Reloader
from orchestrator.errors import BatonError, StartError
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols, PublicServer, admin_served, bound, uvicorn_config
from orchestrator.loop import garbage
from orchestrator.loop.signals import on_hangup, on_signals
from orchestrator.loop.stall_alarm import StallAlarm
from orchestrator.processes.rows import SharedLoad
from orchestrator.processes.supervisor import supervise
from orchestrator.relay.admission import Admission
from orchestrator.relay.flow import Flow
from orchestrator.relay.scope import DataPlane
from orchestrator.routing.planner import Planner
from orchestrator.telemetry.access_log import AccessLog
from orchestrator.telemetry.counters import OTHER, Layout, LoopLagMonitor, Row, Telemetry
from orchestrator.telemetry.logs import LineWriter, Write, configure_logging
from orchestrator.telemetry.record import RequestRecord
from orchestrator.transport.base import Upstream, UpstreamStats
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.codec import CODECS
from orchestrator.wire.info import DEFAULT_TRANSPORT, TRANSPORT_ENV
from orchestrator.workers.health import HttpProbe, Prober
from orchestrator.workers.registry import Registry, WorkerStatus

# Sent to every worker as bearer token, and given by `baton up` to the workers it starts.
WORKER_KEY_ENV = "BATON_WORKER_API_KEY"

_log = logging.getLogger("baton.app")

__all__ = ["WORKER_KEY_ENV", "Orchestrator", "Place", "StartError", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a process that serves has of its own, and what it shares with others that serve beside it."""

    index: int
    started: float  # `time.time()`, of the orchestrator as a whole
    keys: KeyRing | None
    row: Row | None  # what to count into; None: memory of its own
    loads: Sequence[SharedLoad] | None  # per worker's slot; None: nobody else sends to them

    @classmethod
    def alone(cls, options: OrchestratorConfig) -> Place:
        """Raises `StartError`."""
        return cls(index=0, started=time.time(), keys=load_keys(options), row=None, loads=None)


class Orchestrator:
    """The object graph of a process that serves requests, and what the control plane may see of it.

    Made inside a running event loop; works between `start` and `aclose`. It does not probe workers: whoever
    made it keeps its `registry` up to date.
    """

    def __init__(
        self,
        config: Config,
        upstream: Upstream,
        *,
        transport: str,
        credential: str | None,
        place: Place | None = None,
        clock: Callable[[], float] = time.monotonic,  # the loop's own, but uvloop rounds that to milliseconds
        rng: random.Random | None = None,
    ) -> None:
        """`place` is given where several processes serve; `clock` and `rng` (ids, jitter: no secrets) where
        time is simulated."""
        place = place or Place.alone(config.orchestrator)
        models = [model.name for model in config.models]
        limits = config.orchestrator.limits
        self.config = config
        self.transport = transport
        self.index = place.index
        self.started = place.started
        self.random = rng or random.Random()  # noqa: S311
        self.ids = IdSource(self.random)
        self.keys = place.keys
        self.is_draining = False
        self.layout = Layout(models, ENDPOINTS)
        self.telemetry = Telemetry(self.layout, place.row)
        self.lag = LoopLagMonitor(self.telemetry)
        self.registry = Registry(
            worker_addresses(config),
            models,
            transport,
            place.loads,
            health=config.health,
            prefills_locally=config.routing.disaggregate != "strict",
            time=clock,
            random=self.random,
        )
        self._admission = Admission(
            self.registry.pools,
            config.orchestrator.queue,
            seats={model.name: {role: pool.seats for role, pool in model.pools()} for model in config.models},
            processes=config.orchestrator.processes,
            telemetry=self.telemetry,
            time=clock,
        )
        self._upstream = upstream
        self._flow = Flow(
            self.registry,
            _planners(config),
            upstream,
            self._admission,
            telemetry=self.telemetry,
            ids=self.ids,
            credential=credential,
            max_answer_bytes=limits.max_answer_bytes,
            time=clock,
            tokenizes_once=config.routing.tokenize_once,
            kv_lease_s=config.routing.kv_lease_s,
            kv_missing=config.routing.kv_missing,
            max_kept_bytes=limits.max_kept_bytes if config.routing.failover else 0,
        )
        self.data_plane = DataPlane(
            self._flow.serve,
            limits=limits,
            telemetry=self.telemetry,
            keys=self.keys,
            time=clock,
        )
        self._served_by: uvicorn.Config | None = None
        self._control = control_app(self)
        self._stall_alarm = StallAlarm(config.orchestrator.log.stall_s)
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application of the public listener."""
        if scope["path"] in ENDPOINTS:
            await self.data_plane(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    def start(self, write: Write) -> None:
        """Begin to enforce deadlines, to measure, and to write a line per request with `write`."""
        models = [model.name for model in self.config.models]
        access_log = AccessLog(self.telemetry.records, models, self.config.orchestrator.log, write)
        loops = (
            self.data_plane.sweep_forever(),
            self._flow.ledger.sweep_forever(),
            self._admission.sweep_forever(),
            self.lag.run(),
            access_log.run(),
        )
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        self._stall_alarm.start()

    async def aclose(self) -> None:
        """Stop what `start` started, and close all connections to workers. Open requests are cut."""
        await self._flow.aclose()
        self._stall_alarm.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstream.aclose()

    def reconfigure(self, config: Config) -> None:
        """Serve by another config from now on, in what can be changed (`control/reload.py`); workers are the
        registry's, keys the ring's.
        """
        self.config = config
        options, routing = config.orchestrator, config.routing
        self.registry.reconfigure(config.health, prefills_locally=routing.disaggregate != "strict")
        self._flow.reconfigure(
            _planners(config),
            max_answer_bytes=options.limits.max_answer_bytes,
            tokenizes_once=routing.tokenize_once,
            kv_missing=routing.kv_missing,
        )
        self.data_plane.limits = options.limits
        if self._served_by is not None:
            cast("Protocols", self._served_by.http).limit(ServerLimits.of(options))

    # --- the end (`serving.Draining`) -------------------------------------------------------------

    def announce_drain(self) -> None:
        self.is_draining = True

    def refuse_requests(self) -> None:
        self.data_plane.is_refusing = True

    def end_requests(self) -> None:
        self.data_plane.end_all()

    # --- the public listener ----------------------------------------------------------------------

    def server_config(self) -> uvicorn.Config:
        """How uvicorn serves the public listener."""
        self._served_by = uvicorn_config(
            self,
            self.config.orchestrator,
            random=self.random,
            handlers=dict.fromkeys(ENDPOINTS, self.data_plane.handle),
            on_refused=self.note_refused,
        )
        return self._served_by

    def note_refused(self, error: BatonError) -> None:
        """Count and log a request that the server refused before it got here."""
        now = asyncio.get_running_loop().time()
        record = RequestRecord("", OTHER, now)
        record.finished = now
        record.status, record.error_code = error.status, error.code
        self.telemetry.finish(record)

    # --- for the control plane ------------------------------------------------------------------

    def counts(self) -> Sequence[int]:
        return self.telemetry.row

    def workers(self) -> Sequence[WorkerStatus]:
        return self.registry.statuses()

    def upstream(self) -> UpstreamStats:
        return self._upstream.stats()

    def model_problems(self) -> Mapping[str, str | None]:
        return {model: pools.problem() for model, pools in self.registry.pools.items()}

    def processes(self) -> Sequence[ProcessStatus]:
        return (ProcessStatus(self.index, os.getpid(), ProcessState.SERVING, self.telemetry.in_flight),)

    def ends(self) -> Mapping[ProcessEnd, int]:
        return {}


def _planners(config: Config) -> dict[str, Planner]:
    return {model.name: Planner(config.routing) for model in config.models}


# --- running ------------------------------------------------------------------------------------


def run(config: Config, source: ConfigSource) -> int:
    """Serve until SIGINT or SIGTERM, in one process or in several; SIGHUP reloads `config` from `source`.

    Returns the process's exit code.

    Raises `StartError` if it cannot start: a port that is taken, an unreadable file, a wrong BATON_TRANSPORT.
    """
    transport = os.environ.get(TRANSPORT_ENV) or DEFAULT_TRANSPORT
    if transport not in CODECS:
        raise StartError(f"{TRANSPORT_ENV} must be one of {', '.join(CODECS)}, not {transport!r}")
    credential = os.environ.get(WORKER_KEY_ENV)
    writer = LineWriter()
    configure_logging(config.orchestrator.log, writer.write)
    writer.start()
    if is_stale():
        _log.warning("what runs was compiled from other sources than these: `make compile`, or `make pure`")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if config.orchestrator.processes == 1:
                runner.run(_serve(config, source, writer.write, transport=transport, credential=credential))
            else:
                runner.run(supervise(config, source, transport=transport, credential=credential))
    finally:
        writer.close()
    return 0


async def _serve(
    config: Config, source: ConfigSource, write: Write, *, transport: str, credential: str | None
) -> None:
    upstream = PooledUpstream(connect_timeout_s=config.orchestrator.limits.connect_timeout_s)
    orchestrator = Orchestrator(config, upstream, transport=transport, credential=credential)
    probe = HttpProbe(credential)
    prober = Prober(orchestrator.registry, probe, random=orchestrator.random)
    options = config.orchestrator
    reloader = Reloader(source, orchestrator)
    with bound(options.listen, options.backlog) as listener:
        async with admin_served(admin_app(orchestrator, reloader.reload), options, orchestrator.random):
            prober.start()
            orchestrator.start(write)
            garbage.tune()
            try:
                await _serve_until_signalled(orchestrator, listener, reloader)
            finally:
                await prober.aclose()
                await probe.aclose()
                await orchestrator.aclose()


async def _serve_until_signalled(
    orchestrator: Orchestrator, listener: socket.socket, reloader: Reloader
) -> None:
    """The first signal drains, the second cuts."""
    server = PublicServer(orchestrator.server_config(), orchestrator, orchestrator.config.orchestrator)
    with on_signals(server.stop_or_cut), on_hangup(reloader.reload_soon, server.stop_or_cut):
        await server.serve(sockets=[listener])
