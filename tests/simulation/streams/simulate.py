"""One run: a seed's requests from the real end of an orchestrator to the real end of a worker."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from random import Random
from typing import Any

from orchestrator.compiled import is_compiled
from tests.simulation.loop import run_virtually
from tests.simulation.streams import ends
from tests.simulation.streams.asking import ORIGIN, Asking, Outcome
from tests.simulation.streams.link import KEEPALIVE_S, Link, LinkSpec, Listener
from tests.simulation.streams.rules import Rules
from tests.simulation.streams.schedule import PlannedTrouble, Schedule, Trouble, draw
from tests.simulation.streams.server import AppFails, Application, Call, Server
from tests.simulation.trace import Event, Trace

# No request may take this long: what is still open then is reported, and left behind.
HORIZON_S = 300.0

# From the last answer until both ends must be at rest; and if a system has to find a dead connection first.
SETTLE_S = 10.0
SETTLE_SILENT_S = KEEPALIVE_S + 30.0

REFUSALS = (401, 404, 426, 501, 503)


@dataclass(slots=True)
class Result:
    """All that `invariants.check` looks at."""

    schedule: Schedule
    trace: list[Event] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    rules: list[Rules] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what was noticed on the way
    held: dict[str, int] = field(default_factory=dict)  # what is left when all is over
    tasks_left: list[str] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)  # requests that never ended

    @property
    def settle_s(self) -> float:
        return SETTLE_SILENT_S if any(link.is_silenced for link in self.schedule.links) else SETTLE_S

    @property
    def is_calm(self) -> bool:
        """Nothing went wrong beneath the streams, and all requests were streams: HTTP has ends of its own."""
        return self.schedule.is_calm and not any(rules.is_http for rules in self.rules)


def simulate(seed: int) -> Result:
    """Run the schedule of `seed`. Raises what a bug in the simulation itself, or a deadlock, raises."""
    result = Result(draw(seed, is_compiled=is_compiled()))
    schedule = result.schedule
    with (
        _Collected(result.wrong, schedule),
        ends.limits(schedule),
    ):
        run_virtually(_run(result))
    return result


class _Collected(logging.Handler):
    """What is logged as a warning or an error is wrong, unless the application has failed as it should.

    Nobody else hears of it.
    """

    LOGGERS = tuple(map(logging.getLogger, ("asyncio", "baton", "uvicorn.error")))

    def __init__(self, lines: list[str], schedule: Schedule) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines
        self._refuses = not schedule.is_calm

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], AppFails):
            return
        line = self.format(record)
        if not (line.startswith(ends.EXPECTED_LINES) or (self._refuses and ends.REFUSED_LINE in line)):
            self._lines.append(f"a line is logged: {line}")

    def __enter__(self) -> None:
        for logger in self.LOGGERS:
            logger.addHandler(self)
            logger.propagate = False

    def __exit__(self, *error: object) -> None:
        for logger in self.LOGGERS:
            logger.removeHandler(self)
            logger.propagate = True


class _Site:
    """Both ends, and what is between them."""

    def __init__(self, result: Result, trace: Trace) -> None:
        schedule = result.schedule
        self._result, self._trace = result, trace
        self._random = Random(schedule.seed)
        self.application = Application(schedule.requests, trace)
        self.listener = Listener(self._make_protocol, self._make_link)
        self.server = Server(self.application, schedule.http, ends.wrap)
        self.servers = [self.server]
        self.upstream = ends.upstream(self.listener.connect)
        ends.offer(self.upstream, ORIGIN)

    def plan(self, trouble: PlannedTrouble) -> None:
        begin = {Trouble.STOP: self._stop, Trouble.REFUSE: self._refuse, Trouble.RETIRE: self._retire}
        asyncio.get_running_loop().call_at(trouble.at, begin[trouble.trouble], trouble.seconds)

    def _stop(self, seconds: float) -> None:
        self._trace.add("worker", "stops")
        self.listener.is_up = False
        self.server.stop()
        asyncio.get_running_loop().call_later(seconds, self._start_again)

    def _start_again(self) -> None:
        self._trace.add("worker", "is back")
        self.server = Server(self.application, self._result.schedule.http, ends.wrap)
        self.servers.append(self.server)
        self.listener.is_up = True

    def _refuse(self, seconds: float) -> None:
        self._trace.add("worker", "refuses upgrades")
        self.application.refusal = self._random.choice(REFUSALS)
        asyncio.get_running_loop().call_later(seconds, self._accept)

    def _accept(self) -> None:
        self.application.refusal = None

    def _retire(self, seconds: float) -> None:
        self._trace.add("orchestrator", "stops")
        self._closing = asyncio.ensure_future(self.upstream.aclose())

    def _make_protocol(self) -> asyncio.BaseProtocol:
        return self.server.make_protocol()

    def _make_link(self) -> Link:
        specs, time = self._result.schedule.links, asyncio.get_running_loop().time
        rules = Rules(self._result.schedule.window, time)
        spec: LinkSpec = specs[min(len(self._result.links), len(specs) - 1)]
        link = Link(spec, self._random, rules)
        self._trace.add("link", f"is made: {spec}")
        self._result.rules.append(rules)
        self._result.links.append(link)
        return link


async def _run(result: Result) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: result.wrong.append(f"the loop is told: {context}"))
    trace = Trace()
    result.trace = trace.events
    site = _Site(result, trace)
    for trouble in result.schedule.troubles:
        site.plan(trouble)
    asked = [Asking(spec, site.upstream, trace) for spec in result.schedule.requests]
    tasks = [asyncio.create_task(asking.run()) for asking in asked]
    await asyncio.wait(tasks, timeout=HORIZON_S)
    await asyncio.sleep(result.settle_s)
    result.outcomes = [asking.outcome for asking in asked]
    result.calls = site.application.calls
    result.held |= _streams_left(site)
    result.stuck = [outcome.spec.number for outcome in result.outcomes if outcome.ended is None]
    for task in tasks:
        task.cancel()
    await _close(result, site)


async def _close(result: Result, site: _Site) -> None:
    """Stop both ends, and look at what is still there."""
    await site.upstream.aclose()
    result.held["connections of the orchestrator"] = ends.connections_of_orchestrator(site.upstream)
    await asyncio.sleep(result.settle_s)
    result.wrong += site.application.wrong
    result.held |= {
        "connections of the server": sum(len(server.state.connections) for server in site.servers),
        "requests in the server": sum(len(server.state.tasks) for server in site.servers),
    }
    for link in result.links:
        for transport in (link.client, link.server):
            result.wrong += [f"a protocol has raised {error!r}" for error in transport.errors]
    result.tasks_left = [str(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]


def _streams_left(site: _Site) -> dict[str, int]:
    protocols: list[Any] = [link.server.get_protocol() for link in site.listener.links]
    return {
        "requests in the server, both ends open": sum(len(server.state.tasks) for server in site.servers),
        "answers under way": site.upstream.stats().busy,
        "streams at the orchestrator's end": ends.streams_at_orchestrator(site.upstream),
        "streams at the worker's end": sum(map(ends.streams_at_worker, protocols)),
        "connections of a server that was stopped": sum(
            len(server.state.connections) for server in site.servers if server is not site.server
        ),
    }
