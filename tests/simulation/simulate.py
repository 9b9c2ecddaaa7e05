"""One run: a seed's schedule on a simulated cluster, from the first probe until nothing is left."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from orchestrator.telemetry.counters import LeaseState
from orchestrator.telemetry.record import RequestRecord
from tests.simulation.client import Client
from tests.simulation.cluster import Cluster, Dispatch
from tests.simulation.engine import Engine, Handoff, Leg
from tests.simulation.loop import run_virtually
from tests.simulation.schedule import Schedule, draw
from tests.simulation.trace import Event, Trace

# Until the first probes have been answered.
WARM_UP_S = 0.001

# No request may take this long: what is still open then is reported, and left behind.
HORIZON_S = 60.0

# From the last answer until everything else must be at rest.
SETTLE_S = 0.5

# Until then legs that nobody wants any more may be listened to.
LAST_WORD_S = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """One client's request after the run."""

    client: Client
    ended: float | None  # when the orchestrator was done with it
    record: RequestRecord | None


@dataclass(slots=True)
class Result:
    """All that `invariants.check` looks at."""

    schedule: Schedule
    trace: list[Event] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    legs: list[Leg] = field(default_factory=list)
    dispatches: list[Dispatch] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    books: dict[str, LeaseState] = field(default_factory=dict)  # how their leases ended, to the ledger
    held: dict[str, int] = field(default_factory=dict)  # what was still counted as under way, by name
    tasks_left: list[str] = field(default_factory=list)
    errors_logged: list[str] = field(default_factory=list)


def simulate(seed: int) -> Result:
    """Run the schedule of `seed`. Raises what a bug in the simulation itself, or a deadlock, raises."""
    result = Result(draw(seed))
    handler = _Collect(result.errors_logged)
    logger = logging.getLogger("baton")
    logger.addHandler(handler)
    try:
        run_virtually(_run(result))
    finally:
        logger.removeHandler(handler)
    return result


class _Collect(logging.Handler):
    """Errors that the orchestrator logs are bugs of its own."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


async def _run(result: Result) -> None:
    trace = Trace()
    result.trace = trace.events
    cluster = Cluster(result.schedule, trace)
    cluster.start()
    await asyncio.sleep(WARM_UP_S)
    runs = [_Run(Client(spec, trace), cluster) for spec in result.schedule.requests]
    clients = {run.client.spec.number: run.client for run in runs}
    cluster.world.on_step = lambda number: clients[number].note_step()
    tasks = [asyncio.create_task(run.serve()) for run in runs]
    await asyncio.wait(tasks, timeout=HORIZON_S)
    await asyncio.sleep(SETTLE_S)
    for _ in range(int(LAST_WORD_S / SETTLE_S)):
        if cluster.upstream.stats().busy:
            await asyncio.sleep(SETTLE_S)
    await cluster.let_leases_end()
    _collect(result, cluster, runs)
    await cluster.aclose()
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0.001)
    result.held |= _held(cluster)
    result.tasks_left = [str(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]


class _Run:
    """A client's request on its way."""

    def __init__(self, client: Client, cluster: Cluster) -> None:
        self.client = client
        self.ended: float | None = None
        self._cluster = cluster

    async def serve(self) -> None:
        client, loop = self.client, asyncio.get_running_loop()
        await asyncio.sleep(client.spec.at)
        client.begin()
        await self._cluster.plane.handle(client)  # type: ignore[arg-type]
        self.ended = loop.time()
        self._cluster.world.trace.add(client.name, "is served")


def _collect(result: Result, cluster: Cluster, runs: list[_Run]) -> None:
    records = {record.request_id: record for record in cluster.core.telemetry.records}
    result.requests = [Request(run.client, run.ended, records.get(run.client.request_id)) for run in runs]
    result.engines = list(cluster.world.engines.values())
    result.legs = cluster.world.legs
    result.dispatches = cluster.upstream.dispatches
    result.books = cluster.books
    result.handoffs = list(cluster.world.handoffs.values())


def _held(cluster: Cluster) -> dict[str, int]:
    """Everything that counts what is under way. To be looked at when all is over."""
    core = cluster.core
    row, layout = core.telemetry.row, core.telemetry.layout
    return {
        "requests in flight": core.telemetry.in_flight,
        "leases in the ledger": len(cluster.ledger.open),
        "leaked leases": row[layout.leases_leaked],
        "replacements in the budget": cluster.retry_budget.in_use,
        "open scopes": len(cluster.plane.open),
        "legs in the transport": cluster.upstream.stats().busy,
        **{f"seats on {worker.name}": worker.in_flight for worker in core.registry.workers},
    }
