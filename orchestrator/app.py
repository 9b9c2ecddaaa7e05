"""The orchestrator is built from its config, outside in and once."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from orchestrator.api.endpoints import ENDPOINTS, UPLOADS, entry_of, spellings
from orchestrator.config.addresses import routed_addresses
from orchestrator.config.keys import KeyRing, load_keys
from orchestrator.config.options import Config, OrchestratorConfig
from orchestrator.control.public import control_app
from orchestrator.control.rejections import RejectionWatch
from orchestrator.control.scaling_watch import ScalingWatch
from orchestrator.control.state import (
    FoundRequests,
    ProcessEnd,
    ProcessState,
    ProcessStatus,
    RouteAnswer,
    RouteQuestion,
)
from orchestrator.control.worker_watch import WorkerWatch
from orchestrator.errors import BatonError, NotFound
from orchestrator.http.connection import Shared
from orchestrator.http.cors import Cors
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols, uvicorn_config
from orchestrator.http.tls import certificate_of
from orchestrator.legs.connectors import CONNECTORS
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.loop.offload import Offload
from orchestrator.loop.stall_alarm import StallAlarm
from orchestrator.relay.admission import Admission
from orchestrator.relay.explain import explained
from orchestrator.relay.flow import Flow
from orchestrator.relay.relayed import relayed_to_workers
from orchestrator.relay.route import Route
from orchestrator.relay.scope import DataPlane
from orchestrator.relay.tenants import Tenants
from orchestrator.routing.cache_reports import CacheReports
from orchestrator.routing.planner import Planner
from orchestrator.telemetry.access_log import AccessLog, Note
from orchestrator.telemetry.answers import AnswerWriter
from orchestrator.telemetry.counters import OTHER, Layout, Row, Telemetry
from orchestrator.telemetry.decisions import DecisionLog
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.figures import CELLS, FigureWriter
from orchestrator.telemetry.history import History
from orchestrator.telemetry.logs import Write, lost_lines
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.record import RequestRecord
from orchestrator.telemetry.tenants import KeyCounts, KeyTable
from orchestrator.telemetry.timeline import Timelines
from orchestrator.telemetry.tracing import Tracing
from orchestrator.transport.base import Upstream, UpstreamStats
from orchestrator.wire.codec import JSON
from orchestrator.wire.info import Role, Streams
from orchestrator.workers.kv_events import Hears, KvEventFeeds
from orchestrator.workers.offers import Offers
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.worker import SharedLoad, Worker

OWN_SPARE = 1024  # slots for workers that are added, where only one process serves
Share = Callable[[str, Role, bytes], None]  # of a model's policy for a role


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessContext:
    """A process that serves has this: of its own, or shared with others that serve beside it."""

    index: int
    started: float  # `time.time()`, of the orchestrator as a whole
    keys: KeyRing | None
    row: Row | None  # what to count into; None: memory of its own
    loads: Sequence[SharedLoad] | None  # per worker's slot; None: nobody else sends to them
    figures: Row | None = None  # where it counts what workers have done; None: in memory of its own
    share: Share | None = None  # tells the policies of other processes something; None: there are none
    salt: int = 0  # of the log of decisions
    sender: str = ""  # what this orchestrator calls itself to workers, all its processes alike; "": nothing
    key_table: KeyTable | None = None  # where keys are counted; None: in memory of its own
    events: Events | None = None  # None: nobody asks for them

    @classmethod
    def alone(cls, options: OrchestratorConfig) -> ProcessContext:
        """Make that of the only process. Raises `StartError`."""
        keys, salt = load_keys(options), secrets.randbits(64)
        events = Events()
        return cls(
            index=0,
            started=time.time(),
            keys=keys,
            row=None,
            loads=None,
            salt=salt,
            sender=sender_name(),
            events=events,
        )


def sender_name() -> str:
    """Return a name that no other orchestrator has: workers tell each what the others have there."""
    return secrets.token_hex(8)


class Core:
    """The core serves requests, from the data plane down to the seam to workers; it listens nowhere.

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
        context: ProcessContext,
        clock: Callable[[], float] = time.monotonic,  # the loop's own, but uvloop rounds that to milliseconds
        rng: random.Random | None = None,
    ) -> None:
        """`transport` is json, orjson or msgpack; `credential` is what workers want as bearer token.

        `clock` and `rng` (ids, jitter: no secrets) are given where time is simulated.
        """
        limits = config.orchestrator.limits
        self.random = rng or random.Random()  # noqa: S311
        self.ids = IdSource(self.random)
        layout = Layout([model.name for model in config.models], ENDPOINTS)
        self.telemetry = Telemetry(layout, context.row, context.events)
        self.registry = _registry(config, transport, context.loads, time=clock, random=self.random)
        self.admission = Admission(
            self.registry.pools,
            config.orchestrator.queue,
            seats={model.name: {role: pool.seats for role, pool in model.pools()} for model in config.models},
            processes=config.orchestrator.processes,
            telemetry=self.telemetry,
            time=clock,
            is_fair=context.keys is not None,
        )
        self.tenants = _tenants(config, context, self.telemetry, clock)
        self.upstream = upstream
        self._offload = Offload()
        self.dispatcher = Dispatcher(
            self.registry,
            upstream,
            self._offload,
            self.telemetry,
            self.ids,
            credential,
            clock,
            context.sender,
        )
        Offers(self.registry, upstream, lambda worker: self.dispatcher.head(worker, JSON.name))
        self._routes = _routes(
            config, self.registry, self.admission, random=self.random, time=clock, share=context.share
        )
        self.flow = Flow(
            self._routes, self.dispatcher, self.admission, self.telemetry, config.routing, limits
        )
        self.flow.rename(config.aliases)
        self.data_plane = DataPlane(
            self.flow.serve,
            self.flow.serve_upload,
            {path: make(self._offload) for path, make in ENDPOINTS.items()},
            limits=limits,
            telemetry=self.telemetry,
            keys=context.keys,
            time=clock,
            entry_of=entry_of,
            relayed=_relayed(config),
            tenants=self.tenants,
        )
        planners = {model: route.planner for model, route in self._routes.items()}
        self._feeds = KvEventFeeds(self.registry, self._hearer)
        self._reports = CacheReports(self.registry, planners, self._feeds)
        self._sweeps: list[asyncio.Task[None]] = []

    def _hearer(self, worker: Worker) -> Hears | None:
        """Return who hears what a worker tells of its KV cache."""
        return self._routes[worker.address.model].planner.hearer(worker.address.role)

    def start(self) -> None:
        """Begin to enforce deadlines."""
        loops = [
            self.data_plane.sweep_forever(),
            self.flow.ledger.sweep_forever(),
            self.admission.sweep_forever(),
            self._reports.run(),
        ]
        if self.tenants is not None:
            loops.append(self.tenants.sweep_forever())
        self._sweeps = [asyncio.create_task(loop) for loop in loops]

    async def aclose(self) -> None:
        """Stop what `start` started, and close all connections to workers. Open requests are cut."""
        await self.flow.aclose()
        await self._offload.aclose()
        await _cancelled(self._sweeps)
        await self._feeds.aclose()
        await self.upstream.aclose()

    def hear(self, model: str, role: Role, note: bytes) -> None:
        """Let a policy hear what the same one of another process has shared."""
        route = self._routes.get(model)
        if route is not None:
            route.planner.hear(role, note)

    def explain(self, question: RouteQuestion, process: Mapping[str, int]) -> RouteAnswer:
        """Tell what would become of a request; `process` says who tells."""
        return explained(self.flow, self.data_plane, question, process)

    def reconfigure(self, config: Config) -> None:
        """Serve by another config from now on, in what can be changed (`control/reload.py`); workers are the
        registry's, and keys are in the ring already.
        """
        limits, routing = config.orchestrator.limits, config.routing
        self.registry.reconfigure(config.health, routing)
        self.flow.reconfigure(routing, limits)
        self.flow.rename(config.aliases)
        self.admission.reconfigure(config.orchestrator.queue)
        self.data_plane.reconfigure(limits)
        if self.tenants is not None:
            self.tenants.reconfigure(config.orchestrator.tenants)
        self._feeds.settle()


class Orchestrator:
    """An orchestrator is a process that serves requests: its `core`, the pages for clients, and what pages
    may see of it.

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
        context: ProcessContext | None = None,
    ) -> None:
        """`context` is given where several processes serve. Raises `StartError`."""
        context = context or ProcessContext.alone(config.orchestrator)
        self.events = context.events or Events()
        self.core = Core(config, upstream, transport=transport, credential=credential, context=context)
        self.config = config
        self.transport = transport
        self.index = context.index
        self.started = context.started
        self.keys = context.keys
        self.certificate = certificate_of(config.orchestrator)
        self.ids = self.core.ids
        self.registry = self.core.registry
        self.telemetry = self.core.telemetry
        self.layout = self.telemetry.layout
        self.lag = LoopLagMonitor(self.telemetry)
        self._figures = _WorkerFigures(self.registry, context.figures)
        scaling = ScalingWatch(config, self.registry, self.layout, self.counts, self.events)
        self.watch = WorkerWatch(config, self.registry, self._figures.of, self.events, scaling)
        self.rejections = RejectionWatch(self.layout, self.counts, self.keys_counted, self.events)
        self.is_draining = False
        plane = self.core.data_plane
        handlers = dict.fromkeys(spellings(ENDPOINTS), plane.handle)
        server_limits = ServerLimits.of(config.orchestrator, uploads=spellings(UPLOADS))
        cors = Cors(config.orchestrator.cors) if config.orchestrator.cors is not None else None
        self._protocols = Protocols(
            Shared(
                server_limits,
                self.ids,
                self.note_refused,
                handlers,
                cors,
                held=plane.held,
                form_error=plane.form_error,
            )
        )
        self._control = control_app(self)
        self._history = History(
            [model.name for model in config.models], plane.under_way, self.telemetry.records, time=plane.time
        )
        self._timelines = Timelines(self._history, self.index, self._others, time.time, plane.time)
        self._stall_alarm = StallAlarm(config.orchestrator.log.stall_s)
        self._decisions = _decisions(config, self.telemetry, context.salt)
        self._tracing = _tracing(config, self.core)
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve as the ASGI application of the public listener."""
        if entry_of(scope["path"]) is not None:
            await self.core.data_plane(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    def start(self, write: Write) -> None:
        """Begin to enforce deadlines, to measure, and to write a line per request with `write`."""
        models = [model.name for model in self.config.models]
        figures = FigureWriter(self._figures.cells, self._figures.slots)
        answers = AnswerWriter(self.telemetry.layout, self.telemetry.cells)
        log, decisions = self.config.orchestrator.log, self._decisions
        notes: list[Note] = [
            lambda records, _: self.telemetry.fold(),
            lambda records, _: answers.note(records),  # it reads the tokens, which the figures want, too
            lambda records, _: figures.note(records),
        ]
        if decisions is not None:
            notes.append(decisions.note)
        if self._tracing is not None:
            notes.append(self._tracing.note)
        notes.append(self._history.note)
        access_log = AccessLog(self.telemetry.records, models, log, write, notes=notes)
        self.core.start()
        loops = [self.lag.run(), access_log.run()]
        if decisions is not None:
            loops.append(decisions.run())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        self._stall_alarm.start()

    async def aclose(self) -> None:
        """Stop what `start` started, and close all connections to workers. Open requests are cut."""
        await self.core.aclose()
        self._stall_alarm.stop()
        await _cancelled(self._tasks)
        if self._decisions is not None:
            self._decisions.close()
        if self._tracing is not None:
            await self._tracing.aclose()

    def reconfigure(self, config: Config) -> None:
        """Serve by another config from now on; see `Core.reconfigure`."""
        self.config = config
        self.core.reconfigure(config)
        self.watch.reconfigure(config)
        self._protocols.limit(ServerLimits.of(config.orchestrator, uploads=spellings(UPLOADS)))

    # --- the end (`listeners.Draining`) -------------------------------------------------------------

    def announce_drain(self) -> None:
        self.is_draining = True

    def refuse_requests(self) -> None:
        self.core.data_plane.is_refusing = True

    def end_requests(self) -> None:
        self.core.data_plane.end_all()

    # --- the public listener ----------------------------------------------------------------------

    def server_config(self) -> uvicorn.Config:
        """Return how uvicorn serves the public listener."""
        options, certificate = self.config.orchestrator, self.certificate
        return uvicorn_config(
            self, options, self._protocols, random=self.core.random, certificate=certificate
        )

    def note_refused(self, error: BatonError, request_id: str, path: str) -> None:
        """Count and log a request that the server refused before it got here. What is no path of ours is the
        client's text, which is not kept.
        """
        now = asyncio.get_running_loop().time()
        record = RequestRecord(request_id, self.core.data_plane.endpoint_of(path) or OTHER, now)
        record.finished = now
        record.status, record.error_code = error.status, error.code
        self.telemetry.finish(record)

    def note_log_lost(self, lines: int, why: str) -> None:
        """Note how many lines of the log were lost so far."""
        self.telemetry.log_lost(lines)
        self.telemetry.tell("log.lost", lost_lines(lines, why))

    def _others(self, model: str | None, role: str) -> Iterator[tuple[str, str]]:
        """Yield the workers that a leg of this model could have, with their states."""
        for worker in self.registry.workers:
            if worker.address.model == model and worker.address.role in (role, "both"):
                yield worker.name, worker.state

    # --- for the control plane ------------------------------------------------------------------

    def counts(self) -> Sequence[int]:
        return self.telemetry.row

    def workers(self) -> Sequence[WorkerStatus]:
        return self.registry.statuses()

    def keys_counted(self) -> Sequence[KeyCounts]:
        tenants = self.core.tenants
        return [] if tenants is None else tenants.table.counted()

    @property
    def streams(self) -> Streams:
        return self.core.upstream.streams

    def upstream(self) -> UpstreamStats:
        return self.core.upstream.stats()

    def model_problems(self) -> Mapping[str, str | None]:
        return {model: pools.problem() for model, pools in self.registry.pools.items()}

    def processes(self) -> Sequence[ProcessStatus]:
        return (ProcessStatus(self.index, os.getpid(), ProcessState.SERVING, self.telemetry.in_flight),)

    def process_ends(self) -> Mapping[ProcessEnd, int]:
        return {}

    def own_requests(self, query: RequestQuery) -> list[dict[str, Any]]:
        """Return the requests of this process that match."""
        tell = self._timelines.summary if query.name is None else self._timelines.timeline
        return [tell(record) for record in self._history.find(query)]

    async def requests(self, query: RequestQuery) -> FoundRequests:
        return FoundRequests(self.own_requests(query), [])

    async def explain(self, question: RouteQuestion) -> RouteAnswer:
        if question.process not in (None, self.index):
            raise NotFound(f"there is no process {question.process}; there is {self.index}")
        return self.core.explain(question, {"index": self.index, "pid": os.getpid()})


class _WorkerFigures:
    """What each worker has done is counted in the cells of its slot."""

    def __init__(self, registry: Registry, cells: Row | None) -> None:
        """`cells` is given where several processes share memory; None: memory of its own."""
        slots = len(registry.workers) + OWN_SPARE
        self.cells: Row = cells or array("q", bytes(8 * CELLS * slots))
        self._registry = registry
        self._workers: tuple[Worker, ...] = ()
        self._slots: dict[str, int] = {}  # of these

    def slots(self) -> Mapping[str, int]:
        """Return the slots of the workers that are there now, by name."""
        workers = self._registry.workers
        if workers is not self._workers:
            self._workers, self._slots = workers, {worker.name: worker.slot for worker in workers}
        return self._slots

    def of(self, slot: int) -> Sequence[int]:
        """Return what was counted in a slot."""
        start = slot * CELLS
        return list(self.cells[start : start + CELLS]) or [0] * CELLS


def _registry(
    config: Config,
    transport: str,
    loads: Sequence[SharedLoad] | None,
    *,
    time: Callable[[], float],
    random: random.Random,
) -> Registry:
    return Registry(
        routed_addresses(config),
        [model.name for model in config.models],
        transport,
        loads,
        health=config.health,
        routing=config.routing,
        adapters={model.name: model.adapters for model in config.models},
        time=time,
        random=random,
    )


def _decisions(config: Config, telemetry: Telemetry, salt: int) -> DecisionLog | None:
    """Make the log of decisions, if the config names a file. Raises `StartError`."""
    path = config.orchestrator.log.decisions
    if path is None:
        return None
    telemetry.keeps_requests = True
    return DecisionLog(path, [model.name for model in config.models], salt)


def _tracing(config: Config, core: Core) -> Tracing | None:
    """Trace requests, if the config says so. Raises `StartError`."""
    options = config.orchestrator.tracing
    if options is None:
        return None
    tracing = Tracing(options, [model.name for model in config.models], core.random)
    core.data_plane.begin_trace = tracing.begin
    return tracing


def _tenants(
    config: Config, context: ProcessContext, telemetry: Telemetry, time: Callable[[], float]
) -> Tenants | None:
    """Make the tenants, if there are API keys."""
    if context.keys is None:
        return None
    table = context.key_table or KeyTable.alone()
    return Tenants(context.keys, config.orchestrator.tenants, table, telemetry, time)


def _routes(
    config: Config,
    registry: Registry,
    admission: Admission,
    *,
    random: random.Random,
    time: Callable[[], float],
    share: Share | None,
) -> dict[str, Route]:
    """Make the routes, by model."""
    return {
        model.name: Route(
            index,
            registry.pools[model.name],
            admission.gates[model.name],
            Planner(model.name, config.routing, random=random, time=time, share=share),
            CONNECTORS[model.connector],
        )
        for index, model in enumerate(config.models)
    }


def _relayed(config: Config) -> frozenset[bytes]:
    """Return which of a client's header fields workers get."""
    return relayed_to_workers(
        has_rank=config.orchestrator.relay_data_parallel_rank,
        has_priority=config.routing.prefill_order == "fifo",
    )


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
