"""The supervisor starts a data-plane process, talks to it and reaps it by a handle."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from orchestrator.control.state import ProcessState, RouteAnswer, RouteQuestion
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
    ToSupervisor,
)
from orchestrator.processes.membership import Publisher, Report
from orchestrator.processes.sharing import Shared
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.query import RequestQuery

POLL_S = 0.05  # how soon the end of a process is seen

COMMAND = (sys.executable, "-m", "orchestrator.processes.process")

_decoder = msgspec.msgpack.Decoder(ToSupervisor)


class ProcessHandle:
    """A handle accompanies one process from its start to its end; whoever makes it awaits `run`."""

    def __init__(
        self,
        start: Start,
        listener: socket.socket,
        rows_fd: int,
        publisher: Publisher,
        pass_on: Callable[[ProcessHandle, Shared], None],
        events: Events,
    ) -> None:
        """Start the process. `pass_on` is called with what it shares with the others; `events` take what it
        has seen. Raises `OSError` if that is not possible.
        """
        self.index = start.index
        self.row = start.row
        self.state = ProcessState.STARTING
        self._publisher = publisher
        self._pass_on = pass_on
        self._events = events
        self._version = start.snapshot.version  # the newest snapshot that was sent
        self._unsent: list[msgspec.Struct] = [start]  # until the channel is open
        self._channel: Channel[ToSupervisor] | None = None
        loop = asyncio.get_running_loop()
        self._is_serving: asyncio.Future[bool] = loop.create_future()
        self._is_due: asyncio.Future[bool] = loop.create_future()
        self._beats = 0
        self._silent_looks = 0  # in a row
        self._questions = 0
        self._asked: dict[int, asyncio.Future[Explained | RequestsFound | None]] = {}  # by their numbers
        self._end, self._process = _started(listener.fileno(), rows_fd)

    def __repr__(self) -> str:
        return f"process {self.index} (pid {self.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    # --- for whoever keeps a process serving ----------------------------------------------------

    async def wait_serving(self) -> bool:
        """Return True once the process accepts connections, False if it ends first."""
        return await self._is_serving

    async def wait_due(self) -> bool:
        """Return True once the process wants to be replaced, False if it ends first."""
        return await self._is_due

    def reconfigure(self, message: Reconfigured) -> None:
        self._tell(message)

    def replace(self) -> None:
        """Tell the process that another one serves instead: it may end as soon as its connections have."""
        self._tell(Replaced())

    def share(self, message: Shared) -> None:
        """Tell the process what another one shares, if it can listen."""
        if self._channel is not None:
            self._channel.offer(message)

    async def explain(self, question: RouteQuestion) -> RouteAnswer | None:
        """Have the process tell what would become of a request; None if it ends first. A process that does
        not answer is waited for: who asks has a limit.
        """
        asked = Explain(
            number=self._next_number(),
            path=question.path,
            headers=question.headers,
            body=question.body,
            avoid=question.avoid,
        )
        answer = await self._answer_to(asked.number, asked)
        return RouteAnswer(answer.status, answer.content) if isinstance(answer, Explained) else None

    async def find_requests(self, query: RequestQuery) -> bytes | None:
        """Return those of its requests that match, as JSON; None if it ends first. Who asks has a limit."""
        asked = FindRequests(number=self._next_number(), query=query)
        answer = await self._answer_to(asked.number, asked)
        return answer.content if isinstance(answer, RequestsFound) else None

    def _next_number(self) -> int:
        self._questions += 1
        return self._questions

    async def _answer_to(self, number: int, question: msgspec.Struct) -> Explained | RequestsFound | None:
        answer: asyncio.Future[Explained | RequestsFound | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._tell(question)
            return await answer
        finally:
            del self._asked[number]

    def stop(self) -> None:
        """Have the process drain and end."""
        self.state = ProcessState.STOPPING
        self._tell(Stop())

    def cut(self) -> None:
        """Have the process end at once."""
        self._tell(Cut())

    def kill(self) -> None:
        self._process.kill()

    def silent_looks(self, beats: int) -> int:
        """Return at how many looks in a row, with this one, its event loop had not moved; `beats` is its
        count.

        A process that starts has no event loop yet.
        """
        has_moved = beats != self._beats or self.state is ProcessState.STARTING
        self._silent_looks = 0 if has_moved else self._silent_looks + 1
        self._beats = beats
        return self._silent_looks

    # --- its life -------------------------------------------------------------------------------

    async def run(self) -> int:
        """Talk to the process until it has ended; returns its exit code, negative for a signal.

        Cancelled, it kills the process first.
        """
        try:
            async with asyncio.TaskGroup() as group:
                talk = group.create_task(self._talk())
                code = await self._wait_ended()
                talk.cancel()
            return code
        finally:
            self._reap()

    async def _wait_ended(self) -> int:
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  # nothing portable tells
            await asyncio.sleep(POLL_S)
        return code

    def _reap(self) -> None:
        self._process.kill()  # nothing happens if it has ended
        self._process.wait()
        for answer in (self._is_serving, self._is_due):
            if not answer.done():
                answer.set_result(False)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(None)

    async def _talk(self) -> None:
        self._channel = await Channel.open(self._end, _decoder)
        try:
            for message in self._unsent:
                self._channel.send(message)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._publish(self._channel))
                group.create_task(self._listen(self._channel))
        finally:
            self._channel.close()

    def _tell(self, message: msgspec.Struct) -> None:
        if self._channel is None:
            self._unsent.append(message)
        else:
            self._channel.send(message)

    async def _publish(self, channel: Channel[ToSupervisor]) -> None:
        """Send each new snapshot, but only the newest of those that come while the process does not read."""
        while True:
            snapshot = await self._publisher.wait_newer(self._version)
            self._version = snapshot.version
            channel.send(snapshot)
            await channel.drain()

    async def _listen(self, channel: Channel[ToSupervisor]) -> None:
        while (message := await channel.receive()) is not None:
            match message:
                case ServingBegun():
                    self._move(ProcessState.STARTING, ProcessState.SERVING, self._is_serving)
                case ReplacementDue():
                    self._move(ProcessState.SERVING, ProcessState.RETIRING, self._is_due)
                case Report():
                    self._publisher.note(message)
                case Shared():
                    self._pass_on(self, message)
                case Noted():
                    self._events.take(message.event, self.index)
                case Explained() | RequestsFound():
                    self._note_answer(message)

    def _note_answer(self, message: Explained | RequestsFound) -> None:
        asked = self._asked.get(message.number)
        if asked is not None and not asked.done():  # else nobody waits any more
            asked.set_result(message)

    def _move(self, before: ProcessState, after: ProcessState, news: asyncio.Future[bool]) -> None:
        if self.state is before:  # else it is stopping
            self.state = after
            news.set_result(True)


def _started(listener: int, rows: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Return our end of the channel, and the process that inherits the other end."""
    ours, theirs = socket.socketpair()
    inherited = (theirs.fileno(), listener, rows)
    try:
        process = subprocess.Popen(  # noqa: S603  # our own module
            [*COMMAND, *map(str, inherited)], pass_fds=inherited, stdin=subprocess.DEVNULL
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours, process


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"signal {-code}"
