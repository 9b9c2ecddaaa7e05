"""Builds the orchestrator from its config, outside in and once, and runs it in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
import uvloop

from orchestrator.auth import KeyFileError, KeyRing
from orchestrator.config import Config, OrchestratorConfig, split_address
from orchestrator.control import admin_app, control_app
from orchestrator.endpoints import ENDPOINTS
from orchestrator.errors import BatonError
from orchestrator.flow import Flow
from orchestrator.health import Prober
from orchestrator.ids import IdSource
from orchestrator.logs import AccessLog, LineWriter, configure_logging
from orchestrator.relay import DataPlane
from orchestrator.routing.planner import Planner
from orchestrator.server import uvicorn_config
from orchestrator.telemetry import OTHER, Layout, LoopLagMonitor, RequestRecord, Telemetry
from orchestrator.topology import worker_addresses
from orchestrator.transport.base import Upstream, UpstreamStats
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.codec import CODECS
from orchestrator.wire.info import TRANSPORT_ENV
from orchestrator.workers import Registry, WorkerStatus

# Sent to every worker as bearer token, and given by `baton up` to the workers it starts.
WORKER_KEY_ENV = "BATON_WORKER_API_KEY"

_log = logging.getLogger("baton")


class StartError(Exception):
    """The orchestrator cannot start; the message says what to change."""


class Orchestrator:
    """The object graph of one process, and what the control plane may see of it (`control.State`).

    Made inside a running event loop; works between `start` and `aclose`.
    """

    def __init__(self, config: Config, upstream: Upstream, *, transport: str, credential: str | None) -> None:
        models = [model.name for model in config.models]
        limits = config.orchestrator.limits
        self.config = config
        self.transport = transport
        self.started = time.time()
        self.random = random.Random()  # noqa: S311  # ids and jitter, no secrets
        self.ids = IdSource(self.random)
        self.keys = _key_ring(config.orchestrator)
        self.telemetry = Telemetry(Layout(models, ENDPOINTS))
        self.lag = LoopLagMonitor(self.telemetry)
        self.registry = Registry(worker_addresses(config), models, transport)
        self._prober = Prober(self.registry, headers=_authorization(credential))
        self._upstream = upstream
        self._flow = Flow(
            self.registry,
            {model: Planner(config.routing) for model in models},
            upstream,
            telemetry=self.telemetry,
            ids=self.ids,
            credential=credential,
            max_answer_bytes=limits.max_answer_bytes,
        )
        self.data_plane = DataPlane(
            self._flow.serve,
            limits=limits,
            telemetry=self.telemetry,
            keys=self.keys,
            time=time.monotonic,  # the loop's own clock, but uvloop rounds that to milliseconds
        )
        self._control = control_app(self)
        self.admin = admin_app(self)
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application of the public listener."""
        if scope["path"] in ENDPOINTS:
            await self.data_plane(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    def start(self, access_log: AccessLog | None = None) -> None:
        """Begin to probe workers, enforce deadlines and measure."""
        loops = [self.data_plane.sweep_forever(), self.lag.run()]
        if access_log is not None:
            loops.append(access_log.run())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        self._prober.start()

    async def aclose(self) -> None:
        """Stop what `start` started, and close all connections to workers. Open requests are cut."""
        await self._flow.aclose()
        await self._prober.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstream.aclose()

    def note_refused(self, error: BatonError) -> None:
        """Count and log a request that the server refused before it got here."""
        now = asyncio.get_running_loop().time()
        self.telemetry.finish(
            RequestRecord(
                request_id="",
                endpoint=OTHER,
                received=now,
                finished=now,
                status=error.status,
                error_code=error.code,
            )
        )

    def workers(self) -> Sequence[WorkerStatus]:
        return self.registry.statuses()

    def upstream(self) -> UpstreamStats:
        return self._upstream.stats()

    def model_problems(self) -> Mapping[str, str | None]:
        return {model: pools.problem() for model, pools in self.registry.pools.items()}


def _key_ring(config: OrchestratorConfig) -> KeyRing | None:
    if config.api_keys_file is None:
        return None
    try:
        return KeyRing.load(config.api_keys_file)
    except (OSError, KeyFileError) as error:
        raise StartError(f"api_keys_file: {error}") from error


def _authorization(credential: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"} if credential else {}


# --- running ------------------------------------------------------------------------------------


def run(config: Config) -> int:
    """Serve until SIGINT or SIGTERM. Returns the process's exit code.

    Raises `StartError` if it cannot start: a port that is taken, an unreadable file, a wrong BATON_TRANSPORT.
    """
    transport = os.environ.get(TRANSPORT_ENV, "json")
    if transport not in CODECS:
        raise StartError(f"{TRANSPORT_ENV} must be one of {', '.join(CODECS)}, not {transport!r}")
    writer = LineWriter()
    configure_logging(config.orchestrator.log, writer.write)
    writer.start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, transport, writer))
    finally:
        writer.close()
    return 0


async def _serve(config: Config, transport: str, writer: LineWriter) -> None:
    options = config.orchestrator
    upstream = PooledUpstream(connect_timeout_s=options.limits.connect_timeout_s)
    credential = os.environ.get(WORKER_KEY_ENV)
    orchestrator = Orchestrator(config, upstream, transport=transport, credential=credential)
    models = [model.name for model in config.models]
    access_log = AccessLog(orchestrator.telemetry.records, models, options.log, writer.write)
    with contextlib.ExitStack() as sockets:
        listeners = list(_listeners(orchestrator, options, sockets))
        orchestrator.start(access_log)
        try:
            await _serve_until_signalled(listeners)
        finally:
            await orchestrator.aclose()


class _Server(uvicorn.Server):
    """Leaves signals alone: several servers run here, and one signal is for all of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Listener = tuple[uvicorn.Server, socket.socket]


def _listeners(
    orchestrator: Orchestrator, options: OrchestratorConfig, sockets: contextlib.ExitStack
) -> Iterator[Listener]:
    """Sockets are bound here, before anything runs, so that a port that is taken is found at once."""
    public = uvicorn_config(
        orchestrator, options, random=orchestrator.random, on_refused=orchestrator.note_refused
    )
    yield _Server(public), sockets.enter_context(_bound(options.listen, options.backlog))
    if options.admin is not None:
        unlimited = options.model_copy(update={"limit_concurrency": None, "limit_max_requests": None})
        admin = uvicorn_config(
            orchestrator.admin, unlimited, random=orchestrator.random, listen=options.admin
        )
        yield _Server(admin), sockets.enter_context(_bound(options.admin, options.backlog))


@contextlib.contextmanager
def _bound(address: str, backlog: int) -> Iterator[socket.socket]:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from error
    with listener:
        yield listener


async def _serve_until_signalled(listeners: Sequence[Listener]) -> None:
    """Run all servers; the first signal drains them, the second cuts the rest. One that ends, ends all."""
    servers = [server for server, _ in listeners]
    async with _stopped_by_signals(servers):
        tasks = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in listeners]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def _stopped_by_signals(servers: Sequence[uvicorn.Server]) -> AsyncIterator[None]:
    def stop() -> None:
        for server in servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
