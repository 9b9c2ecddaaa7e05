"""One data-plane process of several serves what the inherited socket brings, and obeys the supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator

import msgspec
import uvicorn
import uvloop

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.app import Orchestrator, ProcessContext
from orchestrator.config.keys import KeyRing, worker_key
from orchestrator.config.options import Config, OrchestratorConfig
from orchestrator.control.state import RouteQuestion
from orchestrator.errors import StartError
from orchestrator.http.listeners import TICK_S, Draining, PublicServer
from orchestrator.http.tls import is_renewed
from orchestrator.loop import garbage
from orchestrator.loop.signals import on_signals
from orchestrator.processes.channel import (
    Channel,
    Cut,
    Explain,
    Explained,
    FindRequests,
    Noted,
    Reconfigured,
    Replaced,
    ReplacementDue,
    RequestsFound,
    ServingBegun,
    Start,
    Stop,
    ToProcess,
)
from orchestrator.processes.membership import Follower, Snapshot
from orchestrator.processes.rows import Rows, row_size
from orchestrator.processes.sharing import Shared, Sharing
from orchestrator.telemetry.counters import Layout
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.logs import LineWriter, Write, configure_logging
from orchestrator.telemetry.tenants import SLOTS, KeyTable
from orchestrator.transport.mux import upstream
from orchestrator.wire.info import streams_from_env

HANDSHAKE_S = 5.0  # for TLS handshakes under way: their connections are in no list yet
BUSY_S = 1.0  # a client that asks more often has been told by then that its connection ends
BEATS = 10  # within the time after which this process counts as hung
UPSTREAM_PERIOD_S = 1.0  # how old the figures of connections to workers may be

_log = logging.getLogger("baton.process")
_decoder = msgspec.msgpack.Decoder(ToProcess)


def run(channel: int, listener: int, rows: int) -> int:
    """Serve until the supervisor says otherwise, or is gone; the arguments are file descriptors.

    Returns the exit code.
    """
    for fd in (channel, listener, rows):
        os.set_inheritable(fd, False)
    writer = LineWriter()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(socket.socket(fileno=channel), socket.socket(fileno=listener), rows, writer))
    except StartError as error:
        _log.error("%s", error)
        return 1
    finally:
        writer.close()
    return 0


async def _serve(end: socket.socket, listener: socket.socket, rows_fd: int, writer: LineWriter) -> None:
    channel = await Channel.open(end, _decoder)
    start = await channel.receive()
    if not isinstance(start, Start):
        return  # the supervisor is gone already
    config = Config.model_validate_json(start.config)
    write = in_pieces(writer.write)
    configure_logging(config.orchestrator.log, write)
    writer.start()
    rows = rows_of(rows_fd, config, start)
    process = DataProcess(config, start, rows, channel)
    writer.tell_lost(process.note_log_lost)
    await process.run(listener, write)


def rows_of(fd: int, config: Config, start: Start) -> Rows:
    """Return the supervisor's rows; closes `fd`.

    Raises `StartError` if they are not as this code has them.
    """
    layout = Layout([model.name for model in config.models], ENDPOINTS)
    keys = 0 if start.keys is None else SLOTS
    if row_size(layout, start.slots, keys) != start.row_size:
        raise StartError("another version is installed than the one that runs: restart the orchestrator")
    rows = Rows(fd, layout, start.slots, start.rows, keys)
    rows.close()
    return rows


class DataProcess:
    """A data-plane process has an `Orchestrator`, a channel to the supervisor, and an end."""

    def __init__(self, config: Config, start: Start, rows: Rows, channel: Channel[ToProcess]) -> None:
        self._channel = channel
        self._rows = rows
        self._row = start.row
        self._sharing = Sharing(channel.offer)
        self._key_table = KeyTable(rows.keys(), start.row, start.key_names)
        self._beat_s = config.orchestrator.hang_timeout_s / BEATS
        self._orchestrator = Orchestrator(
            config,
            upstream(
                streams_from_env(os.environ),
                connect_timeout_s=config.orchestrator.limits.connect_timeout_s,
            ),
            transport=start.transport,
            credential=worker_key(os.environ),
            context=ProcessContext(
                index=start.index,
                started=start.started,
                keys=None if start.keys is None else KeyRing(start.keys),
                row=rows.telemetry(start.row),
                loads=rows.loads(start.row),
                figures=rows.figures(start.row),
                share=self._sharing.note,
                salt=start.salt,
                sender=start.sender,
                key_table=self._key_table,
                events=Events(pass_on=lambda event: channel.offer(Noted(event))),
            ),
        )
        self._follower = Follower(self._orchestrator.registry, channel.send)
        self._follower.apply(start.snapshot)
        self._server = DataServer(
            self._orchestrator.server_config(),
            self._orchestrator,
            config.orchestrator,
            on_serving=lambda: channel.send(ServingBegun()),
            on_due=lambda: channel.send(ReplacementDue()),
        )

    async def run(self, listener: socket.socket, write: Write) -> None:
        """Serve until the process is to end."""
        settle = self._orchestrator.registry.settle_forever()
        loops = (self._obey(), self._share_upstream(), self._sharing.run(), self._beat(), settle)
        tasks = [asyncio.create_task(loop) for loop in loops]
        self._orchestrator.start(write)
        garbage.tune()
        try:
            # Whoever wants to end this process alone gets another one instead.
            with on_signals(self._server.retire, [signal.SIGTERM]):
                await self._server.serve(sockets=[listener])
        finally:
            await self._orchestrator.aclose()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._channel.close()

    def note_log_lost(self, lines: int, why: str) -> None:
        """Note how many lines of this process's log were lost so far."""
        self._orchestrator.note_log_lost(lines, why)

    async def _obey(self) -> None:
        while (message := await self._channel.receive()) is not None:
            match message:
                case Snapshot():
                    self._follower.apply(message)
                case Reconfigured():
                    self._reconfigure(message)
                case Shared():
                    for note in message.notes:
                        self._orchestrator.core.hear(note.model, note.role, note.content)
                case FindRequests():
                    found = msgspec.json.encode(self._orchestrator.own_requests(message.query))
                    self._channel.send(RequestsFound(message.number, found))
                case Explain():
                    self._channel.send(self._explained(message))
                case Replaced():
                    self._server.leave()
                case Stop():
                    self._server.stop()
                case Cut():
                    self._server.cut()
        _log.error("the supervisor is gone: this process ends")
        self._server.cut()

    def _explained(self, message: Explain) -> Explained:
        question = RouteQuestion(message.path, message.headers, message.body, message.avoid)
        process = {"index": self._orchestrator.index, "pid": os.getpid()}
        answer = self._orchestrator.core.explain(question, process)
        return Explained(message.number, answer.status, answer.content)

    def _reconfigure(self, message: Reconfigured) -> None:
        if self._orchestrator.keys is not None and message.keys is not None:
            self._orchestrator.keys.exchange(message.keys)
            self._key_table.add(message.key_names)
        is_renewed(self._orchestrator.certificate)
        self._orchestrator.reconfigure(Config.model_validate_json(message.config))

    async def _beat(self) -> None:
        """Show the supervisor that this event loop moves."""
        while True:
            self._rows.beat(self._row)
            await asyncio.sleep(self._beat_s)

    async def _share_upstream(self) -> None:
        """Write the figures of connections to our row from time to time, and the last ones."""
        try:
            while True:
                self._note_upstream()
                await asyncio.sleep(UPSTREAM_PERIOD_S)
        finally:
            self._note_upstream()

    def _note_upstream(self) -> None:
        self._rows.note_upstream(self._row, self._orchestrator.upstream())


class DataServer(PublicServer):
    """Several such servers share a socket: one that is to end alone leaves without losing a request.

    Another one serves instead before it stops accepting connections. From the moment at which it is
    due, by `limit_max_requests` or by `retire`, every answer closes its connection (`http/connection.py`).
    """

    def __init__(
        self,
        config: uvicorn.Config,
        requests: Draining,
        options: OrchestratorConfig,
        *,
        on_serving: Callable[[], None],
        on_due: Callable[[], None],
    ) -> None:
        """`on_serving` is called once connections are accepted, `on_due` when another one is to follow."""
        super().__init__(config, requests, options)
        self._on_serving = on_serving
        self._on_due = on_due
        self._is_retiring = False
        self._may_leave = asyncio.Event()
        self._settle_s = HANDSHAKE_S if config.is_ssl else TICK_S

    def retire(self) -> None:
        """End once another process serves and the requests that are open then have their answers."""
        self._is_retiring = True

    def leave(self) -> None:
        """Leave, as another process serves."""
        self._may_leave.set()

    def stop(self) -> None:
        super().stop()
        self._may_leave.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_serving()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._is_retiring

    async def main_loop(self) -> None:
        await super().main_loop()
        if not self.should_exit:
            self.close_after_answers()
            self._on_due()
            await self._may_leave.wait()
        if not self.should_exit:
            self.notice_s = 0.0
            await self._wait_deserted()

    async def _wait_deserted(self) -> None:
        """Wait until the last connection is closed, unless told to stop.

        Idle ones are closed after `timeout_keep_alive` at the latest, and soon if this process was told to
        retire; a stream may go on for as long as it likes, but not beyond the grace time in that case.
        """
        for server in self.servers:
            server.close()  # who connects now comes to the others
        await asyncio.sleep(max(self._settle_s, BUSY_S) if self._is_retiring else self._settle_s)
        while self.server_state.connections and not (self.should_exit or self._is_retiring):  # noqa: ASYNC110  # uvicorn tells nobody
            await asyncio.sleep(TICK_S)
        for connection in list(self.server_state.connections):
            connection.shutdown()


# --- lines --------------------------------------------------------------------------------------


def in_pieces(write: Write, fd: int = 2) -> Write:
    """Return a `write` for one of several writers to a pipe, where only short pieces arrive whole."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return write

    def write_pieces(data: bytes) -> None:
        for piece in pieces(data):
            write(piece)

    return write_pieces


def pieces(lines: bytes, limit: int = select.PIPE_BUF) -> Iterator[bytes]:
    """Yield pieces of as many whole lines as fit into `limit` bytes; a longer line is a piece of its own."""
    start = 0
    while len(lines) - start > limit:
        end = lines.rfind(b"\n", start, start + limit) + 1 or lines.find(b"\n", start) + 1 or len(lines)
        yield lines[start:end]
        start = end
    if start < len(lines):
        yield lines[start:]
