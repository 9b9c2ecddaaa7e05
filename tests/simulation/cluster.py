"""A simulated cluster: the orchestrator for real, from the data plane down to the seam of its transport."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from orchestrator.app import Core, ProcessContext
from orchestrator.config.options import (
    LEASE_S,
    Config,
    HealthConfig,
    LimitsConfig,
    ModelConfig,
    OrchestratorConfig,
    PoolConfig,
    RoutingConfig,
)
from orchestrator.legs.ledger import KvLease, LeaseLedger
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.base import Answer, Origin, Part
from orchestrator.transport.memory import MemoryUpstream
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.health import ProbeFailed, Prober, ProbeRefused
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.states import IN_SERVICE, WorkerState
from orchestrator.workers.states import Event as WorkerEvent
from orchestrator.workers.worker import Worker
from tests.simulation.client import MODEL
from tests.simulation.engine import MAX_MODEL_LEN, QUESTIONS, Engine, World, handoff_name, kind_of, prompt_of
from tests.simulation.language import number_of
from tests.simulation.schedule import Schedule, Trouble, WorkerSpec
from tests.simulation.trace import Trace

PORT = 8000
# Shorter than the defaults, all of them, so that a run is over within seconds and meets each of them.
LIMITS = LimitsConfig(
    request_timeout_s=3.0, first_byte_timeout_s=2.5, stream_idle_timeout_s=1.5, leg_silence_s=0.8
)
STALL_S = 1.0
HEALTH = HealthConfig(
    interval_s=0.4,
    timeout_s=0.3,
    suspect_s=0.2,
    silence_s=0.7,
    eject_s=0.5,
    eject_max_s=2.0,
    slow_start_s=1.0,
)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One attempt of the orchestrator to send a leg."""

    time: float
    worker: str
    out_since: float | None  # the worker, in the orchestrator's eyes
    is_draining: bool  # it still serves those that it was chosen for before
    kind: str
    number: int  # of the client's request
    handoff: str | None
    is_refused: bool  # no connection


class ObservedUpstream(MemoryUpstream):
    """Notes every attempt, also those that no worker sees."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(connect_timeout_s=LIMITS.connect_timeout_s)
        self.dispatches: list[Dispatch] = []
        self.out_since: dict[str, float] = {}  # by host: those that may get no leg: gone, ejected, draining
        self.draining: set[str] = set()  # hosts
        self.on_send: Callable[[], None] = lambda: None
        self._trace = trace

    async def send(
        self, origin: Origin, method: str, target: str, headers: bytes, body: Sequence[Part]
    ) -> Answer:
        self.on_send()
        out_since = self.out_since.get(origin.host)
        is_refused = True
        try:
            answer = await super().send(origin, method, target, headers, body)
            is_refused = False
            return answer
        finally:
            if target not in QUESTIONS:
                self._note(origin, target, out_since, headers, body, is_refused=is_refused)

    def _note(
        self,
        origin: Origin,
        target: str,
        out_since: float | None,
        headers: bytes,
        body: Sequence[Part],
        *,
        is_refused: bool,
    ) -> None:
        codec: Any = msgspec.msgpack if b"x-msgpack" in headers else msgspec.json
        document = codec.decode(b"".join(body))
        kind, number = kind_of(target, document), number_of(prompt_of(document))
        now = asyncio.get_running_loop().time()
        name, is_draining = handoff_name(document), origin.host in self.draining
        self.dispatches.append(
            Dispatch(now, origin.host, out_since, is_draining, kind, number, name, is_refused)
        )
        if is_refused:
            self._trace.add(origin.host, f"refuses {kind} of {number}")


class SimulatedProbe:
    """Asks simulated workers how they are (`health.Probe`)."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self, worker: Worker) -> Introduction | None:
        engine = self._world.engines[worker.origin.host]
        if not engine.is_up:
            raise ProbeRefused("connection refused")
        asked = engine.engine_id
        await engine.is_awake.wait()
        if engine.engine_id != asked:
            raise ProbeFailed("cut off by a crash")
        return None if worker.state in IN_SERVICE else _introduction(engine.spec)


@functools.lru_cache(4096)
def _introduction(spec: WorkerSpec) -> Introduction:
    info = WorkerInfo(
        role=spec.role,
        model=MODEL,
        decodes=["json", "msgpack"] if spec.decodes_msgpack else ["json"],
        engine="sim",
        engine_version="0",
        token_ids=["list"] if spec.gives_ids else [],
        kv_lease_s=spec.lease_s,
    )
    return Introduction(info, MAX_MODEL_LEN)


class Books:
    """All leases that there were.

    None escapes: one ends by a leg that is sent while it is open, or by the end of its time, long after.
    """

    PERIOD_S = 0.5  # half of the shortest lease

    def __init__(self, ledger: LeaseLedger) -> None:
        self._ledger = ledger
        self._leases: dict[KvLease, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.look()
        self._timer = asyncio.get_running_loop().call_later(self.PERIOD_S, self.start)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        self._leases |= dict.fromkeys(self._ledger.open)

    def ended(self) -> dict[str, LeaseState]:
        self.look()
        return {_name_of(lease): lease.state for lease in self._leases if lease.state not in OPEN}


OPEN = (LeaseState.HELD, LeaseState.USED)


def _name_of(lease: KvLease) -> str:
    name = handoff_name({"kv_transfer_params": msgspec.json.decode(lease.handoff.params)})
    assert name is not None
    return name


class Cluster:
    """Everything of one run but its clients. To be made inside the running virtual loop."""

    def __init__(self, schedule: Schedule, trace: Trace) -> None:
        random = Random(schedule.seed)
        self.upstream = ObservedUpstream(trace)
        self.world = World(random, trace, self.upstream)
        self.core = Core(
            _config(tuple((worker.name, worker.role) for worker in schedule.workers)),
            self.upstream,
            transport=schedule.transport,
            credential=None,
            context=ProcessContext(index=0, started=0.0, keys=None, row=None, loads=None),
            clock=asyncio.get_running_loop().time,
            rng=random,
        )
        self.plane = self.core.data_plane
        self._prober = Prober(
            self.core.registry,
            SimulatedProbe(self.world),
            random=random,
            time=asyncio.get_running_loop().time,
        )
        self.ledger = self.core.flow.ledger
        self.retry_budget = self.core.flow._retry_budget
        self._books = Books(self.ledger)
        self.upstream.on_send = self._books.look
        self._make_engines(schedule)
        self.core.registry.news.moved.add(self._note_move)

    def start(self) -> None:
        self._prober.start()
        self.core.start()
        self._books.start()

    @property
    def books(self) -> dict[str, LeaseState]:
        """How each lease has ended, by the name of its hand-off, as the ledger says."""
        return self._books.ended()

    async def let_leases_end(self) -> None:
        """Until the ledger has written off what nobody could release. Workers are probed no more."""
        await self._prober.aclose()
        if self.ledger.open:
            await asyncio.sleep(LEASE_S + 1)

    async def aclose(self) -> None:
        self._books.close()
        await self.core.aclose()

    def _make_engines(self, schedule: Schedule) -> None:
        workers = {worker.origin.host: worker for worker in self.core.registry.workers}
        for spec in schedule.workers:
            faults = [fault for fault in schedule.faults if fault.worker == spec.name]
            Engine(spec, workers[spec.name].origin, self.world, faults)
        loop = asyncio.get_running_loop()
        for trouble in schedule.troubles:
            engine = self.world.engines[trouble.worker]
            happens = {
                Trouble.CRASH: engine.crash,
                Trouble.STOP: engine.stop,
                Trouble.FREEZE: engine.freeze,
                Trouble.SLOW: engine.slow_down,
                Trouble.SICK: engine.fall_sick,
                Trouble.DRAINED: functools.partial(self._drain, engine, workers[engine.name]),
            }
            loop.call_at(trouble.at, happens[trouble.trouble], trouble.seconds)

    def _drain(self, engine: Engine, worker: Worker, seconds: float) -> None:
        engine.note_trouble("is drained", seconds)
        registry = self.core.registry
        registry.drain(worker)
        asyncio.get_running_loop().call_later(seconds, registry.undrain, worker)

    def _note_move(self, worker: Worker, event: WorkerEvent) -> None:
        host = worker.origin.host
        self.world.trace.add(host, f"is {worker.state} to the orchestrator: {event}")
        if worker.state is WorkerState.DRAINING:
            self.upstream.draining.add(host)
        else:
            self.upstream.draining.discard(host)
        if worker.state in IN_SERVICE - {WorkerState.DRAINING}:
            self.upstream.out_since.pop(host, None)
        else:
            self.upstream.out_since.setdefault(host, asyncio.get_running_loop().time())


@functools.cache
def _config(workers: tuple[tuple[str, str], ...]) -> Config:
    pools = {
        role: PoolConfig(urls=[f"http://{name}:{PORT}" for name, of_role in workers if of_role == role])
        for role in dict(map(reversed, workers))  # type: ignore[arg-type]
    }
    return Config(
        orchestrator=OrchestratorConfig(limits=LIMITS),
        models=[ModelConfig(name=MODEL, **pools)],
        health=HEALTH,
        routing=RoutingConfig(handoff_stall_s=STALL_S),
    )
