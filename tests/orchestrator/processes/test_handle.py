"""One process as its supervisor sees it; what becomes of several together is in `test_supervisor.py`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from orchestrator.control.state import ProcessState, RouteAnswer, RouteQuestion
from orchestrator.processes import handle
from orchestrator.processes.channel import Start
from orchestrator.processes.handle import ProcessHandle, describe_exit
from orchestrator.processes.membership import Publisher
from orchestrator.processes.sharing import Note, Shared
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.query import RequestQuery
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import registry_of
from tests.waiting import is_running

pytestmark = pytest.mark.processes

# Does with its channel what it is told: serves, is due once it is replaced, ends with as many as it was sent.
OBEDIENT = """
import socket, sys, msgspec
from orchestrator.processes.channel import (
    Cut, Explain, Explained, FindRequests, Noted, Replaced, ReplacementDue, RequestsFound, ServingBegun,
    Snapshot, Start, Stop, ToProcess
)
from orchestrator.processes.membership import Report
from orchestrator.processes.sharing import Shared
from orchestrator.processes.sharing import Note, Shared
from orchestrator.telemetry.events import Event as Happened
from orchestrator.workers.states import Event

end, decoder, seen = socket.socket(fileno=int(sys.argv[1])), msgspec.msgpack.Decoder(ToProcess), 0

def exactly(size):
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        if not part:
            sys.exit(9)
        data += part
    return data

def tell(message):
    document = msgspec.msgpack.encode(message)
    end.sendall(len(document).to_bytes(4, "big") + document)

while True:
    match decoder.decode(exactly(int.from_bytes(exactly(4), "big"))):
        case Start():
            tell(ServingBegun())
        case Snapshot(workers=workers):
            seen = len(workers)
            tell(Report(workers[0].address.name, workers[0].epoch, Event.LOST, "reset"))
        case Shared() as message:
            tell(message)
        case FindRequests(number=number, query=query):
            if query.name == "die":
                sys.exit(8)
            tell(Noted(Happened(0, 1.5, "request.resent", "x" * 9, "w")))
            tell(RequestsFound(number, b'["%s"]' % query.name.encode()))
        case Explain(number=number, body=body):
            if body == b"die":
                sys.exit(8)
            tell(Explained(number, 200, body))
        case Replaced():
            tell(ReplacementDue())
        case Stop():
            sys.exit(seen)
        case Cut():
            sys.exit(7)
"""
PATIENCE_S = 60.0


def start_of(publisher: Publisher) -> Start:
    return Start(
        index=2,
        row=5,
        rows=6,
        row_size=8,
        slots=1,
        config=b"{}",
        transport="json",
        started=0.0,
        keys=None,
        snapshot=publisher.snapshot,
    )


@asynccontextmanager
async def running(
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    pass_on: Callable[[ProcessHandle, Shared], None] = lambda _, shared: None,
) -> AsyncIterator[tuple[ProcessHandle, asyncio.Task[int], Registry]]:
    """A child that runs this, with the task that awaits its end."""
    monkeypatch.setattr(handle, "COMMAND", (sys.executable, "-c", program))
    registry = registry_of({"decode": 2})
    publisher = Publisher(registry)
    rows = os.memfd_create("rows")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = ProcessHandle(start_of(publisher), listener, rows, publisher, pass_on, Events())
        os.close(rows)
        task = asyncio.create_task(made.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield made, task, registry
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not is_running(made.pid)


def in_loop(test: Callable[[pytest.MonkeyPatch], Awaitable[None]]) -> Callable[[pytest.MonkeyPatch], None]:
    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        asyncio.run(test(monkeypatch))  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@in_loop
async def test_a_process_is_started_told_and_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        assert (made.index, made.row, made.state) == (2, 5, ProcessState.STARTING)
        assert repr(made) == f"process 2 (pid {made.pid})"
        assert await made.wait_serving()
        assert made.state is ProcessState.SERVING
        made.replace()
        assert await made.wait_due()
        assert made.state is ProcessState.RETIRING
        made.stop()
        assert made.state is ProcessState.STOPPING
        assert await task == 0


@in_loop
async def test_what_it_is_told_before_it_listens_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        made.cut()  # its channel is not open yet
        assert await task == 7
        assert not await made.wait_due()


@in_loop
async def test_snapshots_go_down_and_reports_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, registry):
        first, second = registry.workers
        await made.wait_serving()
        lost = asyncio.Event()
        registry.news.doubted.add(lambda worker: lost.set())
        registry.judge.mark_gone(second, "refused")
        await lost.wait()
        assert (first.state, first.last_error) == (WorkerState.SUSPECT, "reset")
        made.stop()
        assert await task == 2


def question(body: bytes) -> RouteQuestion:
    return RouteQuestion("/v1/completions", [(b"x-session-id", b"a")], body, ("m/decode/0",))


@in_loop
async def test_a_process_is_asked_what_would_become_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        asked = [made.explain(question(body)) for body in (b"1", b"2", b"3")]  # it cannot listen yet
        assert await asyncio.gather(*asked) == [RouteAnswer(200, body) for body in (b"1", b"2", b"3")]
        assert await made.explain(question(b"die")) is None
        assert await task == 8
        assert made._asked == {}


@in_loop
async def test_a_process_is_asked_for_its_requests_and_tells_what_it_has_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        asked = [made.find_requests(RequestQuery(name=name)) for name in ("a", "b")]
        assert await asyncio.gather(*asked) == [b'["a"]', b'["b"]']
        told = made._events.after()
        assert [(event.number, event.kind, event.process) for event in told] == [
            (1, "request.resent", 2),
            (2, "request.resent", 2),
        ]
        assert await made.find_requests(RequestQuery(name="die")) is None
        assert await task == 8
        assert made._asked == {}


@in_loop
async def test_what_a_process_shares_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on: asyncio.Queue[tuple[ProcessHandle, Shared]] = asyncio.Queue()

    def put(made: ProcessHandle, shared: Shared) -> None:
        passed_on.put_nowait((made, shared))

    message = Shared([Note("m", "prefill", b"note")])
    async with running(OBEDIENT, monkeypatch, put) as (
        made,
        task,
        _,
    ):
        made.share(message)  # it cannot listen yet
        await made.wait_serving()
        made.share(message)
        assert await passed_on.get() == (made, message)
        made.stop()
        await task
    assert passed_on.empty()


@in_loop
async def test_who_ends_before_it_serves_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("raise SystemExit(3)", monkeypatch) as (made, task, _):
        assert not await made.wait_serving()
        assert not await made.wait_due()
        assert await task == 3


@in_loop
async def test_a_killed_process_ends_with_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        await made.wait_serving()
        made.kill()
        assert await task == -signal.SIGKILL


@in_loop
async def test_whoever_stops_waiting_for_it_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, task, _):
        await made.wait_serving()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not is_running(made.pid)


@in_loop
async def test_looks_at_a_loop_that_stands_still_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(OBEDIENT, monkeypatch) as (made, _, _):
        assert [made.silent_looks(0) for _ in range(3)] == [0, 0, 0]  # it starts
        await made.wait_serving()
        assert [made.silent_looks(beats) for beats in (1, 1, 1, 2, 2)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("code", "described"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-40, "signal 40")],
)
def test_how_an_end_is_described(code: int, described: str) -> None:
    assert describe_exit(code) == described
