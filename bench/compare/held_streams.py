"""Streams are opened and then held: each has delivered its first event and stays silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.shared.load import post
from bench.shared.processes import Failed

AT_ONCE = 64  # being opened; more would measure the backlog
LIMIT_S = 120.0


@asynccontextmanager
async def held_streams(port: int, body: bytes, count: int) -> AsyncIterator[None]:
    """Hold `count` streams of POST /v1/chat/completions at 127.0.0.1:`port` open for the block.

    Raises `Failed` if one is refused or ends, or if not all have an event within two minutes.
    """
    writers: list[asyncio.StreamWriter] = []
    try:
        await _open_all(port, body, count, writers)
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


async def _open_all(port: int, body: bytes, count: int, writers: list[asyncio.StreamWriter]) -> None:
    slots = asyncio.Semaphore(AT_ONCE)
    try:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(_open(slots, port, body, writers) for _ in range(count)))
    except TimeoutError:
        raise Failed(f"{len(writers)} of {count} streams open after {LIMIT_S:.0f} s") from None


async def _open(
    slots: asyncio.Semaphore, port: int, body: bytes, writers: list[asyncio.StreamWriter]
) -> None:
    async with slots:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(post("/v1/chat/completions", body))
        await _first_event(reader)


async def _first_event(reader: asyncio.StreamReader) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        raise Failed(f"a stream was refused: {status.decode(errors='replace').strip() or 'closed'}")
    try:
        await reader.readuntil(b"\ndata: {")
    except asyncio.IncompleteReadError:
        raise Failed("a stream ended before its first event") from None
