"""What a hostile end of a multiplexed connection sends follows from a `Random` alone.

Most of it is right, so that what is wrong finds streams in every state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from bench.shared.bodies import MODEL
from orchestrator.wire.headers import header_block
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    HEADER,
    LAST,
    LEAVE,
    MAX_CREDIT,
    MAX_PAYLOAD,
    OPEN,
    PING,
    RESET,
    U16,
    VERSION,
    credit,
    frame,
    reset,
)


class Burst(NamedTuple):
    """Frames that are written at once. If they are fatal, whoever reads them must close the connection."""

    data: bytes
    frames: int
    is_fatal: bool = False


_JSON = [(b"host", b"worker"), (b"content-type", b"application/json")]
_BODY = json.dumps({"model": MODEL, "prompt": "Say it", "max_tokens": 3}).encode()
_TARGETS = ("/health",) * 12 + ("/v1/models", "/v1/completions", "/nowhere", "/v1/baton/streams", "/%2e?a=%")
_SIZES = (0, 1, 100, 100, 5000, MAX_PAYLOAD)
_CREDITS = (0, 1, 100_000, 2**20, MAX_CREDIT - 2**20, MAX_CREDIT, 2**32 - 1)
_BAD_HEADS: tuple[bytes, ...] = (
    b"",
    b"GET",
    b"GET /",
    b"GET /\n",
    b"GET \r\n",
    b"GET /\r\nno colon\r\n",
    b"GET /\r\na: b",
    b"GET /\r\na: b\nc: d\r\n",
    b"GET /\r\na: \x00\r\n",
    b"GET /\r\n: b\r\n",
    b"GET / HTTP/1.1\r\na: b\r\n\r\n",
    b"GET http://a/\r\n",
    b"G(T /\r\n",
    b"GET /\xff\r\n",
    bytes(MAX_PAYLOAD),
)
_BAD_ANSWERS: tuple[bytes, ...] = (
    b"",
    b"\0",
    U16.pack(0),
    U16.pack(99),
    U16.pack(101),
    U16.pack(1000),
    b"\0\xc8a\r\n",
)
_BAD_ANSWERS += (b"\0\xc8a: b", b"\0\xc8a: b\nc: d\r\n", b"\0\xc8a: \x00\r\n", b"\xff" * MAX_PAYLOAD)
_ANSWER = U16.pack(200) + b"content-type: text/plain\r\n"


# --- as an orchestrator -------------------------------------------------------------------------


class ToWorker:
    """One connection's bursts, towards a worker."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._highest = 0

    def bursts(self) -> Iterator[Burst]:
        random = self._random
        for _ in range(random.choice((3, 30, 100))):
            burst = random.choice(_TO_WORKER)(self)
            yield burst
            if burst.is_fatal:
                return

    def _number(self) -> int:
        """Return a number that was used, of late as a rule."""
        return max(1, self._highest - min(self._random.randrange(1, 40) // 4, self._highest))

    def open(self) -> Burst:
        random = self._random
        self._highest += random.choice((1, 1, 1, 1, 1000))
        method, target = random.choice(("GET", "GET", "POST", "HEAD")), random.choice(_TARGETS)
        head = f"{method} {target}\r\n".encode() + header_block(_JSON)
        if target == "/v1/completions" or method == "POST":
            data = frame(OPEN, self._highest, head) + frame(BODY | END, self._highest, _BODY)
            return Burst(data, 2)
        return Burst(frame(OPEN | random.choice((END, END, END, 0)), self._highest, head), 1)

    def body(self) -> Burst:
        """Send it a piece of a body, which it may not await, or have no credit for."""
        if not self._highest:
            return self.ping()
        size, count = self._random.choice(_SIZES), self._random.choice((1, 1, 1, 6))
        kind = BODY | self._random.choice((0, 0, END))
        return Burst(frame(kind, self._number(), bytes(size)) * count, count)

    def word(self) -> Burst:
        """Send a small frame of a stream that is under way, or over."""
        if not self._highest:
            return self.ping()
        number, random = self._number(), self._random
        kind = random.choice((RESET, RESET, LEAVE, CREDIT))
        if kind == RESET:
            return Burst(reset(number, random.choice((0, 0, 0, 1, 2, 77, 255))), 1)
        return Burst(frame(LEAVE, number) if kind == LEAVE else credit(number, random.choice(_CREDITS)), 1)

    def ping(self) -> Burst:
        count = self._random.choice((*(1,) * 9, 100))
        return Burst(frame(PING, 0, self._random.randbytes(8)) * count, count)

    def rapid_resets(self) -> Burst:
        """Open streams, and give each up in the same write."""
        first, count = self._highest + 1, self._random.choice((2, 50))
        self._highest += count
        head = b"GET /health\r\n" + header_block(_JSON)
        pairs = (frame(OPEN | END, number, head) + reset(number, 0) for number in range(first, first + count))
        return Burst(b"".join(pairs), 2 * count)

    def many_fields(self) -> Burst:
        self._highest += 1
        return Burst(frame(OPEN | END, self._highest, b"GET /health\r\n" + b"a: \r\n" * 12_000), 1)

    def fatal(self) -> Burst:
        if self._random.random() < 0.6:
            return self.ping()  # seldom, so that connections grow old
        make = self._random.choice((*_FATAL, _for_worker_alone))
        return Burst(make(self._random, self._highest), 1, is_fatal=True)


_TO_WORKER: tuple[Callable[[ToWorker], Burst], ...] = (
    *(ToWorker.open,) * 5,
    *(ToWorker.body,) * 4,
    *(ToWorker.word,) * 8,
    ToWorker.ping,
    ToWorker.rapid_resets,
    ToWorker.many_fields,
    ToWorker.fatal,
)


def _for_worker_alone(random: Random, highest: int) -> bytes:
    """Return what is wrong towards a worker."""
    number = highest + 1
    return random.choice(
        (
            frame(OPEN, number, random.choice(_BAD_HEADS)),
            frame(OPEN, random.randrange(0, highest + 1), b"GET /health\r\n"),
            frame(HEAD, max(1, highest), _ANSWER),
            frame(DATA, max(1, highest), b"a"),
            frame(LAST, 0),
        )
    )


# --- as a worker --------------------------------------------------------------------------------


class ToOrchestrator:
    """One connection's bursts, towards an orchestrator; `opened` are the streams that it has opened."""

    def __init__(self, random: Random) -> None:
        self.opened: list[int] = []
        self._random = random

    def burst(self) -> Burst:
        return self._random.choice(_TO_ORCHESTRATOR)(self)

    def _number(self) -> int:
        return self._random.choice(self.opened[-8:])

    def answer(self) -> Burst:
        """Answer a stream, which may be over."""
        number, random = self._number(), self._random
        if random.random() < 0.3:
            return Burst(frame(HEAD | END, number, _ANSWER), 1)
        count = random.choice((1, 3, 20))
        data = frame(DATA, number, b"data: {}\n\n") * count + frame(DATA | END, number)
        return Burst(frame(HEAD, number, _ANSWER) + data, count + 2)

    def data(self) -> Burst:
        """Send data that may have no head before it, and no credit."""
        size, count = self._random.choice(_SIZES), self._random.choice((1, 1, 1, 6))
        kind = DATA | self._random.choice((0, 0, END))
        return Burst(frame(kind, self._number(), bytes(size)) * count, count)

    def word(self) -> Burst:
        number, random = self._number(), self._random
        if random.random() < 0.5:
            return Burst(reset(number, random.choice((1, 2, 2, 2, 0, 77))), 1)
        return Burst(credit(number, random.choice(_CREDITS)), 1)

    def ping(self) -> Burst:
        count = self._random.choice((*(1,) * 9, 100))
        return Burst(frame(PING, 0, self._random.randbytes(8)) * count, count)

    def last(self) -> Burst:
        return Burst(frame(LAST, 0), 1)

    def bad_head(self) -> Burst:
        return Burst(frame(HEAD, self._number(), self._random.choice(_BAD_ANSWERS)), 1)

    def fatal(self) -> Burst:
        make = self._random.choice((*_FATAL, _for_orchestrator_alone))
        return Burst(make(self._random, self.opened[-1]), 1, is_fatal=True)


_TO_ORCHESTRATOR: tuple[Callable[[ToOrchestrator], Burst], ...] = (
    *(ToOrchestrator.answer,) * 12,
    *(ToOrchestrator.data,) * 4,
    *(ToOrchestrator.word,) * 3,
    *(ToOrchestrator.ping,) * 2,
    ToOrchestrator.last,
    ToOrchestrator.bad_head,
    ToOrchestrator.fatal,
)

# Answers to an upgrade; the first is right.
UPGRADES: Sequence[bytes] = (
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: %b\r\n\r\n" % VERSION,
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n" + bytes(100),
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK",
    b"HTTP/1.1 426 Upgrade Required\r\nupgrade: baton-streams/2\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: " + b"a" * 100_000,
    b"HTTP/1.1 101 Switching Prot",
    b"SSH-2.0-OpenSSH\r\n\r\n",
    b"\r\n\r\n",
    b"",
)


def _for_orchestrator_alone(random: Random, highest: int) -> bytes:
    """Return what is wrong towards an orchestrator."""
    return random.choice(
        (
            frame(OPEN, highest + 1, b"GET /\r\n"),
            frame(BODY, highest, b"a"),
            frame(LEAVE, highest),
            frame(PING | END, 0, random.randbytes(8)),
        )
    )


# --- wrong in both directions -------------------------------------------------------------------


def _unknown_kind(random: Random, highest: int) -> bytes:
    return HEADER.pack(0, random.choice((0, LAST + 1, 0x7F, END, 0xFF)), 1)


def _too_large(random: Random, highest: int) -> bytes:
    size = random.choice((MAX_PAYLOAD + 1, 2**24, 2**31, 2**32 - 1))
    return HEADER.pack(size, random.choice((OPEN, BODY, HEAD, DATA, RESET, PING)), max(1, highest))


def _wrong_size(random: Random, highest: int) -> bytes:
    kind, size = random.choice(
        ((RESET, 0), (RESET, 2), (LEAVE, 1), (CREDIT, 3), (CREDIT, 5), (PING, 7), (LAST, 1))
    )
    return frame(kind, max(1, highest), bytes(size))


def _never_opened(random: Random, highest: int) -> bytes:
    kind, payload = random.choice(((RESET, b"\2"), (CREDIT, b"\0\0\0\1")))
    return frame(kind, random.choice((highest + 1, highest + 1000, 2**32 - 1)), payload)


def _of_no_stream(random: Random, highest: int) -> bytes:
    kind, payload = random.choice(
        ((RESET, b"\2"), (CREDIT, b"\0\0\0\1"), (DATA, b"a"), (BODY, b"a"), (HEAD, _ANSWER))
    )
    return frame(kind, 0, payload)


def _of_a_stream(random: Random, highest: int) -> bytes:
    return frame(PING, max(1, highest), bytes(8))


def _noise(random: Random, highest: int) -> bytes:
    """Return what has the size of no frame."""
    return b"\xff" + random.randbytes(random.randrange(8, 2000))


_FATAL: tuple[Callable[[Random, int], bytes], ...] = (
    _unknown_kind,
    _too_large,
    _wrong_size,
    _never_opened,
    _of_no_stream,
    _of_a_stream,
    _noise,
)
