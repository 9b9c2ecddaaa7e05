"""The KV cache goes from prefill to decode this way: over a TCP port of the prefill worker.

Messages are JSON lines. A decode worker connects and asks; the kind of hand-off decides what it is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

CONNECT_S = 5.0  # vLLM's limit for a NIXL handshake
BROKEN = (OSError, TimeoutError, ValueError, msgspec.MsgspecError)  # what a lost or senseless peer raises

_LAST_WORDS_S = 1.0  # for those who answer when the worker stops
_MAX_LINE = 16 * 1024 * 1024  # a million block ids


class _Named(msgspec.Struct, tag_field="op"):
    engine_id: str
    request_id: str


class PullAsk(_Named, tag="pull"):
    """The decode worker wants the KV cache now. It is answered by one `Reply`."""

    block_ids: list[int]


class Extend(_Named, tag="extend"):
    """The decode worker will pull, but not yet."""


class Release(_Named, tag="release"):
    """The decode worker will not pull."""


class PushAsk(msgspec.Struct, tag_field="op", tag="push"):
    """A decode worker waits for a transfer: told at once, again and again, and when it has blocks.

    It is answered by pending `Reply`s while the prefill leg is there, and by another one in the end.
    """

    transfer_id: str
    is_ready: bool = False


PullAsks = PullAsk | Extend | Release
Ask = PullAsks | PushAsk


class Reply(msgspec.Struct):
    """`digest` stands for the KV cache; without it, the KV cache cannot be had, unless it is pending."""

    digest: bytes | None = None
    is_pending: bool = False


_ASK: msgspec.json.Decoder[Ask] = msgspec.json.Decoder(Ask)
_REPLY = msgspec.json.Decoder(Reply)
_encode = msgspec.json.Encoder().encode


class Line:
    """A line is a connection. Reading raises one of `BROKEN` if the peer is lost or talks nonsense."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def tell(self, message: Ask | Reply) -> None:
        """Send it. Nothing happens if the line is closed."""
        if not self._writer.is_closing():
            self._writer.write(_encode(message) + b"\n")

    async def drain(self) -> None:
        """Wait until the peer takes what was told. Raises `OSError`."""
        await self._writer.drain()

    async def read_ask(self) -> Ask:
        return _ASK.decode(await self._reader.readline())

    async def read_reply(self) -> Reply:
        return _REPLY.decode(await self._reader.readline())

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connect(host: str, port: int) -> AsyncIterator[Line]:
    """Open a line to a prefill worker, closed when the block ends. Raises one of `BROKEN`."""
    async with asyncio.timeout(CONNECT_S):
        line = Line(*await asyncio.open_connection(host, port, limit=_MAX_LINE))
    try:
        yield line
    finally:
        line.close()


@asynccontextmanager
async def serve(host: str, port: int, answer: Callable[[Ask, Line], Awaitable[None]]) -> AsyncIterator[int]:
    """Listen while the block runs; its value is the port. `answer` gets the first ask of each connection."""
    lines: dict[Line, asyncio.Task[None]] = {}

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        lines[line] = asyncio.current_task()  # type: ignore[assignment]  # there is one
        try:
            await answer(await line.read_ask(), line)
            await line.drain()
        except BROKEN:
            pass  # a broken peer is the peer's problem
        finally:
            del lines[line]
            line.close()

    server = await asyncio.start_server(accept, host, port, limit=_MAX_LINE)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await _hang_up(lines)


async def _hang_up(lines: dict[Line, asyncio.Task[None]]) -> None:
    for line in lines:
        line.close()
    if lines:
        await asyncio.wait(list(lines.values()), timeout=_LAST_WORDS_S)
