"""A soak's load has requests of many kinds, some given up at any moment, all drawn from one seed."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from random import Random
from typing import Any

import httptools

from bench.shared.bodies import MODEL, encoded, long_chat, small_chat
from bench.shared.load import post
from bench.shared.processes import Failed

TOKENS = 8  # of each answer
FRESH = 0.1  # share of requests on a connection of their own, beside those that follow a cancelled one
LONGEST_WAIT_S = 0.03  # of a client that leaves without an answer: beyond what most answers take
MOST_BYTES = 2000  # that one has read when it leaves within the answer: as many as a stream has
TAIL = 200  # bytes of an answer that are kept: its end is checked, and tells why if it is an error
RESET = struct.pack("ii", 1, 0)  # linger for 0 s: closing sends RST


@dataclass(frozen=True)
class Kind:
    """Requests of a kind must be answered with `status`, and a body that ends with `end`."""

    name: str
    weight: int
    body: bytes
    status: int = 200
    path: str = "/v1/chat/completions"
    end: bytes = b"}"

    def encode(self) -> bytes:
        return post(self.path, self.body)


def kinds() -> list[Kind]:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    prompt = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": TOKENS}
    stream = small_chat(stream=True, max_tokens=TOKENS)
    return [
        Kind("chat", 50, small_chat(max_tokens=TOKENS)),
        Kind("stream", 25, stream, end=b"data: [DONE]\n\n"),
        Kind("completion", 8, encoded(prompt), path="/v1/completions"),
        Kind("64 KB chat", 5, long_chat(messages=28)),
        Kind("unknown model", 3, encoded({**chat, "model": "nobody"}), 404),
        Kind("bad JSON", 3, b'{"model": "mock", "messages": [', 400),
        Kind("refused by the worker", 3, encoded({**chat, "max_tokens": -1}), 400),
        Kind("unknown path", 3, encoded(chat), 404, path="/v1/nothing"),
    ]


class Phase(StrEnum):
    """A client leaves in one of these phases."""

    SENDING = "while it sends"  # after a share of the request
    WAITING = "while it waits"  # so many seconds after the request
    READING = "while it reads"  # after so many bytes of the answer


@dataclass(frozen=True)
class Cancel:
    phase: Phase
    at: float
    is_reset: bool


@dataclass(frozen=True)
class Request:
    kind: Kind
    needs_connection: bool  # of its own
    cancel: Cancel | None


def schedule(random: Random, cancels: float) -> Iterator[Request]:
    """Yield requests without end, the share `cancels` of them given up; the same for the same `random`."""
    of = kinds()
    weights = [kind.weight for kind in of]
    while True:
        kind = random.choices(of, weights)[0]
        cancel = _cancel(random) if random.random() < cancels else None
        yield Request(kind, random.random() < FRESH, cancel)


def _cancel(random: Random) -> Cancel:
    limits = {Phase.SENDING: 1.0, Phase.WAITING: LONGEST_WAIT_S, Phase.READING: MOST_BYTES}
    phase = random.choice(list(limits))
    return Cancel(phase, random.uniform(0, limits[phase]), random.random() < 0.5)


@dataclass(frozen=True)
class Answer:
    status: int
    end: bytes  # of the body

    def problem(self, kind: Kind) -> str | None:
        """Say what is wrong; None if it is what this kind is to be answered with."""
        if self.status != kind.status:
            return f"{kind.name}: HTTP {self.status} {self.end.decode(errors='replace')}"
        if not self.end.endswith(kind.end):
            return f"{kind.name}: ends with {self.end!r}"
        return None


class Connection(asyncio.Protocol):
    """A connection has one request at a time; a client that gives one up closes it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_kept = True

    @property
    def is_open(self) -> bool:
        return self._is_kept and not self._transport.is_closing()

    async def ask(self, request: bytes, cancel: Cancel | None) -> Answer | None:
        """Return None if the connection was closed before the answer was complete, by whom ever."""
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[Answer | None] = self._loop.create_future()
        self._end = b""
        self._unread = float("inf")  # bytes that are still to be read
        self._is_whole = cancel is None or cancel.phase is not Phase.SENDING
        if cancel is None:
            self._transport.write(request)
        else:
            self._begin_only(request, cancel)
        return await self._answered

    def close(self, *, by_reset: bool = False) -> None:
        if by_reset:
            link = self._transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._transport.abort()

    def _begin_only(self, request: bytes, cancel: Cancel) -> None:
        self._by_reset = cancel.is_reset
        match cancel.phase:
            case Phase.SENDING:
                self._transport.write(request[: int(cancel.at * len(request))])
                self._loop.call_soon(self._leave, self._answered)
            case Phase.WAITING:
                self._transport.write(request)
                self._loop.call_later(cancel.at, self._leave, self._answered)
            case Phase.READING:
                self._transport.write(request)
                self._unread = cancel.at

    def _leave(self, answered: asyncio.Future[Answer | None]) -> None:
        if not answered.done():
            self.close(by_reset=self._by_reset)

    # --- called by the event loop and the parser

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread -= len(data)
        if self._unread <= 0:
            self._leave(self._answered)
        else:
            self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._end = (self._end + body)[-TAIL:]

    def on_message_complete(self) -> None:
        # A path that is not there is answered before the whole request is: what comes next would be its rest.
        self._is_kept = self._is_whole and self._parser.should_keep_alive()
        self._answered.set_result(Answer(self._parser.get_status_code(), self._end))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_result(None)


@dataclass
class Tally:
    answered: Counter[str] = field(default_factory=Counter)  # by kind
    cancelled: Counter[Phase] = field(default_factory=Counter)
    connections: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return self.answered.total() + self.cancelled.total() + self.problems.total()

    def note(self, request: Request, answer: Answer | None) -> None:
        """A client that came too late to leave has been answered."""
        if answer is None and request.cancel is not None:
            self.cancelled[request.cancel.phase] += 1
        elif problem := answer.problem(request.kind) if answer else f"{request.kind.name}: cut short":
            self.problems[problem] += 1
        else:
            self.answered[request.kind.name] += 1


class Load:
    """Clients share one list of requests, each with one request at a time."""

    def __init__(self, port: int, requests: Iterator[Request], on_end: Callable[[Tally], None]) -> None:
        """`on_end` is called after every request."""
        self._port = port
        self._requests = requests
        self._on_end = on_end
        self._encoded = {kind.name: kind.encode() for kind in kinds()}
        self.tally = Tally()

    async def client(self) -> None:
        """Raises `Failed` if nobody listens."""
        connection = None
        for request in self._requests:
            if connection is None or request.needs_connection or not connection.is_open:
                if connection is not None:
                    connection.close()
                connection = await self._connect()
            answer = await connection.ask(self._encoded[request.kind.name], request.cancel)
            self.tally.note(request, answer)
            self._on_end(self.tally)
        if connection is not None:
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        except OSError as error:
            raise Failed(f"cannot connect after {self.tally.requests} requests: {error}") from error
        self.tally.connections += 1
        return connection


async def run_load(
    port: int,
    requests: Iterator[Request],
    *,
    count: int,
    clients: int,
    on_end: Callable[[Tally], None],
    stall_s: float = 60.0,
) -> Tally:
    """Send the first `count` of `requests` to 127.0.0.1:`port`, `clients` at a time.

    Raises `Failed` if no request ends for `stall_s`, or nobody listens.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(stall_s) as limit:

            def note(tally: Tally) -> None:
                limit.reschedule(loop.time() + stall_s)
                on_end(tally)

            load = Load(port, islice(requests, count), note)
            await asyncio.gather(*(load.client() for _ in range(clients)))
    except TimeoutError:
        raise Failed(f"no request has ended for {stall_s:.0f} s, {load.tally.requests} before") from None
    return load.tally
