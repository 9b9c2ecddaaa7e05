"""The simulated engine publishes what becomes of its prefix cache as vLLM does, at endpoints for ZeroMQ."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.wire.kv_events import (
    DEVICE,
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    Batch,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
    encoded,
)


class KvEvents:
    """What happens in one turn of the event loop is one batch. Nothing happens without an endpoint."""

    def __init__(self, endpoint: str | None, replay_endpoint: str | None, buffered: int) -> None:
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffered)
        self._events: list[Event] = []
        self._number = 0
        self._socket: Any = None

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        """Publish while the block runs. Raises `OSError` if an endpoint cannot be bound."""
        if self._endpoint is None:
            yield
            return
        import zmq
        import zmq.asyncio

        with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as self._socket:
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(self._endpoint)
            task = asyncio.create_task(self._answer(context))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                self._endpoint = None

    def stored(
        self, hashes: Sequence[bytes], first: int, tokens: Sequence[int], size: int, salt: str
    ) -> None:
        """Tell that the blocks of a prompt from `first` on are in the cache; `hashes` are those of all up to
        the last new one, and `tokens` the prompt's.
        """
        if self._endpoint is None:
            return
        names: list[BlockHash] = [_named(block_hash) for block_hash in hashes]
        keys: list[Any] = [None] * (len(names) - first)
        if salt and first == 0:
            keys[0] = [salt]
        self._tell(
            BlockStored(
                names[first:],
                names[first - 1] if first else None,
                list(tokens[first * size : len(names) * size]),
                size,
                medium=DEVICE,
                extra_keys=keys,
                group_idx=0,
            )
        )

    def removed(self, block_hash: bytes) -> None:
        if self._endpoint is not None:
            self._tell(BlockRemoved([_named(block_hash)], medium=DEVICE, group_idx=0))

    def cleared(self) -> None:
        if self._endpoint is not None:
            self._tell(AllBlocksCleared())

    def _tell(self, event: Event) -> None:
        if not self._events:
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        events, self._events = self._events, []
        if self._endpoint is None:
            return
        number = self._number.to_bytes(SEQUENCE_BYTES, "big")
        payload = encoded(Batch(time.time(), events, 0))
        self._number += 1
        self._buffer.append((number, payload))
        self._socket.send_multipart([b"", number, payload])

    async def _answer(self, context: Any) -> None:
        """Answer who asks for batches that were missed."""
        if self._replay_endpoint is None:
            return
        import zmq

        with context.socket(zmq.ROUTER) as socket, contextlib.suppress(zmq.ContextTerminated):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(self._replay_endpoint)
            while True:
                client, _, first = await socket.recv_multipart()
                for number, payload in list(self._buffer):
                    if number >= first:
                        await socket.send_multipart([client, b"", b"", number, payload])
                await socket.send_multipart([client, b"", b"", END_OF_REPLAY, b""])


def _named(block_hash: bytes) -> int:
    """Return what vLLM calls a block outside, by default: the last 64 bits of its hash."""
    return int.from_bytes(block_hash[-8:], "big")
