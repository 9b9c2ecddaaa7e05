"""The supervisor keeps several processes running that serve one socket, and does what is done once.

It owns the admin listener, the probes, the membership and the sums of all numbers, and serves no request
itself. Each data-plane process has an index, and always a successor: one that dies is followed by another,
one that is due for recycling serves on until the next one does, one whose event loop stands still is killed.
None outlives the supervisor: they end when their channel closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.app import sender_name
from orchestrator.config.addresses import routed_addresses
from orchestrator.config.keys import Key, load_keys
from orchestrator.config.options import Config
from orchestrator.control.admin import admin_app
from orchestrator.control.certificate_watch import CertificateWatch
from orchestrator.control.rejections import RejectionWatch
from orchestrator.control.reload import ConfigSource, Reloader
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
from orchestrator.discovery.discovery import Discovery
from orchestrator.errors import NotFound, StartError, Unavailable
from orchestrator.http.ids import IdSource
from orchestrator.http.listeners import admin_served, bound
from orchestrator.http.tls import certificate_of
from orchestrator.loop.signals import on_hangup, on_signals
from orchestrator.processes.channel import Reconfigured, Start
from orchestrator.processes.handle import ProcessHandle, describe_exit
from orchestrator.processes.membership import Publisher
from orchestrator.processes.rows import BASE, Rows, spare_workers
from orchestrator.processes.sharing import Shared
from orchestrator.telemetry.counters import Layout
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.logs import LineWriter, lost_lines
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.tenants import SLOTS, KeyCounts, KeyTable
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.info import Streams, streams_from_env
from orchestrator.workers.cache_alarm import CacheAlarm
from orchestrator.workers.health import HttpProbe, Prober
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus

# Processes that end before they serve, in a row and while no other serves, before the supervisor gives up.
MAX_FAILED_STARTS = 5
FIRST_DELAY_S = 0.1  # before a process that ended too soon is followed by another
LONGEST_DELAY_S = 5.0
STABLE_S = 10.0  # a process that served for so long did not end too soon
STOP_MARGIN_S = 15.0  # from the limit of draining to a cut: KV is released, connections are closed
LOOKS = 5  # at a process that may hang, within the limit; it beats at least as often
CUT_S = 15.0  # from a cut to SIGKILL
EXPLAIN_S = 5.0  # until a process has told what would become of a request, or what has become of some

_log = logging.getLogger("baton.supervisor")


async def supervise(
    config: Config,
    source: ConfigSource,
    run_key: str | None = None,
    writer: LineWriter | None = None,
    *,
    transport: str,
    credential: str | None,
) -> None:
    """Serve in `config.orchestrator.processes` processes until SIGINT or SIGTERM; a second one cuts.

    SIGHUP reloads `config` from `source`. `run_key` is for `admin_app`, `writer` is that of this process's
    log.

    Raises `StartError` if that is impossible. No process is left in either case.
    """
    options = config.orchestrator
    stop = Stopping()
    with bound(options.listen, options.backlog) as listener, on_signals(stop.request):
        supervisor = Supervisor(config, listener, transport=transport, credential=credential)
        discovery = Discovery(config, supervisor.registry, supervisor.events, supervisor.random)
        reloader = Reloader(source, supervisor, discovery.reconfigure)
        if writer is not None:
            writer.tell_lost(supervisor.note_log_lost)
        admin = admin_app(supervisor, reloader.reload, run_key)
        async with admin_served(admin, options, supervisor.random, supervisor.certificate):
            with on_hangup(reloader.reload_soon, stop.request):
                discovery.start()
                try:
                    await supervisor.run(stop)
                finally:
                    await discovery.aclose()


class Stopping:
    """Signals ask for this: the first to drain, the second to cut."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.hurry = asyncio.Event()

    def request(self) -> None:
        (self.hurry if self.requested.is_set() else self.requested).set()


class Supervisor:
    """A supervisor keeps all data-plane processes; the admin pages see it as `control.state.AdminState`.

    It is made inside a running event loop; everything happens in `run`.
    """

    def __init__(
        self, config: Config, listener: socket.socket, *, transport: str, credential: str | None
    ) -> None:
        """The supervisor closes `listener` when it stops. Raises `StartError`."""
        models = [model.name for model in config.models]
        addresses = routed_addresses(config)
        self._indexes = range(config.orchestrator.processes)
        self.config = config
        self.transport = transport
        self.random = random.Random()  # noqa: S311  # ids, no secrets
        self.ids = IdSource(self.random)
        self.keys = load_keys(config.orchestrator)
        self.certificate = certificate_of(config.orchestrator)
        self._salt = secrets.randbits(64)
        self.layout = Layout(models, ENDPOINTS)
        # The base, and for each index one that serves and one that retires.
        self._slots = len(addresses) + spare_workers(config)
        keys = 0 if self.keys is None else SLOTS
        self._rows = Rows.create(self.layout, self._slots, 1 + 2 * len(self._indexes), keys)
        self._key_table = KeyTable(self._rows.keys(), BASE, [key.name for key in self.keys or ()])
        self._free_rows = _queue_of(range(BASE + 1, self._rows.count))
        self.registry = Registry(
            addresses,
            models,
            transport,
            self._rows.loads(BASE),
            health=config.health,
            routing=config.routing,
            random=self.random,
        )
        self._publisher = Publisher(self.registry)
        self._probe = HttpProbe(credential, sender=sender_name(), tell=self.registry.reports.note)
        self.events = Events()
        scaling = ScalingWatch(config, self.registry, self.layout, self.counts, self.events)
        self.watch = WorkerWatch(config, self.registry, self._rows.figures_of, self.events, scaling)
        self._prober = Prober(self.registry, self._probe, random=self.random, events=self.events)
        self._listener = listener
        self._started = time.time()
        self._processes: dict[ProcessHandle, asyncio.Task[None]] = {}  # with the task that watches each
        self._ends: Counter[ProcessEnd] = Counter()
        self._failed_starts = 0  # in a row
        self._is_stopping = False

    async def run(self, stop: Stopping) -> None:
        """Keep all processes serving until `stop`. Raises `StartError` if none can be made to serve."""
        self._prober.start()
        try:
            kept = (self._keep(index) for index in self._indexes)
            alarm = CacheAlarm(self.registry)
            rejections = RejectionWatch(self.layout, self.counts, self.keys_counted, self.events)
            certificate = CertificateWatch(self.certificate, self.events)
            watches = (alarm.run(), self.watch.run(), rejections.run(), certificate.run())
            await _first_of(stop.requested.wait(), self._kill_hung(), *watches, *kept)
        finally:
            self._is_stopping = True
            self._listener.close()  # who connects now is refused, as soon as all processes have closed it too
            await self._end_all(stop.hurry)
            await self._prober.aclose()
            await self._probe.aclose()
            self._rows.close()

    def reconfigure(self, config: Config) -> None:
        """Have all processes, also those to come, serve by another config in what can be changed."""
        self.config = config
        self.registry.reconfigure(config.health, config.routing)
        self.watch.reconfigure(config)
        self._key_table.add(key.name for key in self.keys or ())
        message = Reconfigured(
            config=self._config_json(), keys=self._key_list(), key_names=self._key_table.names
        )
        for process in self._processes:
            process.reconfigure(message)

    # --- for the admin pages --------------------------------------------------------------------

    def counts(self) -> Sequence[int]:
        return self._rows.counts()

    def workers(self) -> Sequence[WorkerStatus]:
        return self.registry.statuses()

    def keys_counted(self) -> Sequence[KeyCounts]:
        return [] if self.keys is None else self._key_table.counted()

    @property
    def streams(self) -> Streams:
        """Return what the data processes read, too; whoever started this has looked at it."""
        return streams_from_env(os.environ)

    def upstream(self) -> UpstreamStats:
        return self._rows.upstream()

    def processes(self) -> Sequence[ProcessStatus]:
        return [
            ProcessStatus(process.index, process.pid, process.state, self._rows.in_flight(process.row))
            for process in self._processes
        ]

    def process_ends(self) -> Mapping[ProcessEnd, int]:
        return self._ends

    async def explain(self, question: RouteQuestion) -> RouteAnswer:
        """Have a process tell what would become of a request: the one that is asked for, or the first."""
        serving = [process for process in self._processes if process.state is ProcessState.SERVING]
        if question.process is not None:
            serving = [process for process in serving if process.index == question.process]
            if not serving:
                raise NotFound(f"no process {question.process} serves")
        with contextlib.suppress(TimeoutError):
            for process in serving:
                async with asyncio.timeout(EXPLAIN_S):
                    answer = await process.explain(question)
                if answer is not None:
                    return answer
        raise Unavailable("no process can tell now")

    async def requests(self, query: RequestQuery) -> FoundRequests:
        """Ask all processes that have served; one that stands still does not hold up the answer."""
        asked = [process for process in self._processes if process.state is not ProcessState.STARTING]
        answers = await asyncio.gather(*(self._found_by(process, query) for process in asked))
        silent = [process.index for process, answer in zip(asked, answers, strict=True) if answer is None]
        found = [request for answer in answers for request in answer or ()]
        found.sort(key=itemgetter("total_ms" if query.slowest else "received"), reverse=True)
        return FoundRequests(found[: query.limit], silent)

    async def _found_by(self, process: ProcessHandle, query: RequestQuery) -> list[dict[str, Any]] | None:
        """Return what a process finds; None if it does not answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXPLAIN_S):
                answer = await process.find_requests(query)
            return None if answer is None else msgspec.json.decode(answer, type=list[dict[str, Any]])
        return None

    # --- one process after the other ------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Keep a process serving under `index` until cancelled. Raises `StartError`."""
        retiring: ProcessHandle | None = None  # serves until the next one does
        delay = _Delay()
        while True:
            process = await self._start_serving(index)
            if process is None:
                await asyncio.sleep(delay.next_s())
                continue
            if retiring is not None:
                retiring.replace()
                retiring = None
            if await process.wait_due():
                retiring = process
            else:
                await asyncio.sleep(delay.next_s())

    async def _start_serving(self, index: int) -> ProcessHandle | None:
        """Return a new process that serves; None if it ends before.

        Raises `StartError` after too many of those.
        """
        process = self._start(index, await self._free_rows.get())
        if process is None or not await process.wait_serving():
            self._note_failed_start()
            return None
        self._failed_starts = 0
        _log.info("%r serves", process)
        return process

    def _start(self, index: int, row: int) -> ProcessHandle | None:
        try:
            process = ProcessHandle(
                self._orders(index, row),
                self._listener,
                self._rows.fd,
                self._publisher,
                self._pass_on,
                self.events,
            )
        except OSError as error:
            self._note("process.failed", f"process {index} cannot be started: {error}")
            self._free_rows.put_nowait(row)
            return None
        self._processes[process] = asyncio.create_task(self._watch(process))
        return process

    def _pass_on(self, source: ProcessHandle, message: Shared) -> None:
        """Tell all other processes what one shares with them."""
        for process in self._processes:
            if process is not source:
                process.share(message)

    def _orders(self, index: int, row: int) -> Start:
        return Start(
            index=index,
            row=row,
            rows=self._rows.count,
            row_size=self._rows.row_size,
            slots=self._slots,
            config=self._config_json(),
            transport=self.transport,
            started=self._started,
            keys=self._key_list(),
            snapshot=self._publisher.snapshot,
            salt=self._salt,
            sender=self._probe.sender,
            key_names=self._key_table.names,
        )

    def _config_json(self) -> bytes:
        return self.config.model_dump_json().encode()

    def _key_list(self) -> list[Key] | None:
        return None if self.keys is None else list(self.keys)

    def _note_failed_start(self) -> None:
        self._failed_starts += 1
        is_serving = any(process.state is not ProcessState.STARTING for process in self._processes)
        if self._failed_starts >= MAX_FAILED_STARTS and not is_serving:
            raise StartError(
                f"{MAX_FAILED_STARTS} processes in a row ended before they could serve; their lines say why"
            )

    async def _watch(self, process: ProcessHandle) -> None:
        """Watch a process until it has ended; what it counted is kept."""
        try:
            code = await process.run()
            if not self._is_stopping:
                self._note_end(process, code)
        finally:
            del self._processes[process]
            self._rows.fold(process.row)
            self._free_rows.put_nowait(process.row)

    def _note_end(self, process: ProcessHandle, code: int) -> None:
        if process.state is ProcessState.STARTING:
            text = f"{process!r} ended with {describe_exit(code)} before it could serve"
            self._note("process.failed", text)
        elif code:
            self._ends[ProcessEnd.DIED] += 1
            text = f"{process!r} ended with {describe_exit(code)}: what it was serving is lost"
            self._note("process.died", text)
        else:
            self._ends[ProcessEnd.RECYCLED] += 1
            self._note("process.recycled", f"{process!r} has ended", logging.INFO)

    def _note(self, kind: str, text: str, level: int = logging.ERROR) -> None:
        """Log what has become of a process, and have it as an event."""
        _log.log(level, "%s", text)
        self.events.note(kind, text)

    def note_log_lost(self, lines: int, why: str) -> None:
        """Note how many lines of this process's log were lost so far."""
        self.events.note_often("log.lost", lost_lines(lines, why))

    async def _kill_hung(self) -> None:
        """Kill processes whose event loops stand still, until cancelled; others follow them.

        The limit is counted in looks, so that a pause of this process is not taken for theirs.
        """
        limit_s = self.config.orchestrator.hang_timeout_s
        while True:
            await asyncio.sleep(limit_s / LOOKS)
            for process in self._processes:
                if process.silent_looks(self._rows.beats(process.row)) >= LOOKS:
                    self._note("process.hung", f"{process!r} has stood still for {limit_s:g} s: killed")
                    process.kill()

    # --- the end --------------------------------------------------------------------------------

    async def _end_all(self, hurry: asyncio.Event) -> None:
        for process in self._processes:
            process.stop()
        limit_s = self.config.orchestrator.timeout_graceful_shutdown + STOP_MARGIN_S
        await _first_of(self._wait_ended(), hurry.wait(), self._kill_hung(), limit_s=limit_s)
        for process in self._processes:
            process.cut()
        await _first_of(self._wait_ended(), limit_s=CUT_S)
        for process in self._processes:
            _log.error("%r does not end: killed", process)
            process.kill()
        await self._wait_ended()

    async def _wait_ended(self) -> None:
        """Wait until no process is left."""
        if self._processes:
            await asyncio.wait(self._processes.values())


def _queue_of(rows: Iterable[int]) -> asyncio.Queue[int]:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for row in rows:
        queue.put_nowait(row)
    return queue


class _Delay:
    """A delay lies between the starts of two processes of one index: the longer, the sooner they ended."""

    def __init__(self) -> None:
        self._last_s = 0.0
        self._asked = asyncio.get_running_loop().time()

    def next_s(self) -> float:
        """Return the delay after the end of a process; call this once for each."""
        now = asyncio.get_running_loop().time()
        ran_s = now - self._asked - self._last_s
        self._asked = now
        is_stable = ran_s >= STABLE_S
        self._last_s = FIRST_DELAY_S if is_stable else min(2 * self._last_s or FIRST_DELAY_S, LONGEST_DELAY_S)
        return self._last_s


async def _first_of(*waits: Coroutine[Any, Any, object], limit_s: float | None = None) -> None:
    """Wait until one has ended, for `limit_s` at most; the others are cancelled. Raises what it raises."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
