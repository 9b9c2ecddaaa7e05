"""The way of the KV cache from prefill to decode: a TCP port of the prefill worker.

A connection carries one JSON line each way. The decode worker asks for what a hand-off names and gets the
digest that stands for the cache; or it gives the hand-off up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec

_MAX_LINE = 16 * 1024 * 1024  # a million block ids
_TIMEOUT_S = 5.0  # vLLM's limit for a NIXL handshake


class KvLost(Exception):
    """The KV cache of a hand-off cannot be had."""


Notice = Literal["extend", "release"]


class _Ask(msgspec.Struct):
    op: Literal["pull"] | Notice
    engine_id: str
    request_id: str
    block_ids: list[int]


class _Reply(msgspec.Struct):
    digest: bytes | None = None


_REPLY = msgspec.json.Decoder(_Reply)
_ASK = msgspec.json.Decoder(_Ask)
_encode = msgspec.json.Encoder().encode


class Remote(msgspec.Struct, frozen=True, rename=lambda name: f"remote_{name}"):
    """Where the KV cache of a prompt lies, as a hand-off's `kv_transfer_params` say."""

    host: str
    port: int
    engine_id: str
    request_id: str
    block_ids: list[list[int]]  # per KV cache group

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Remote:
        """Raises `KvLost` if something is missing or wrong. (vLLM's engine dies of some of that.)"""
        try:
            return msgspec.convert(params, cls, strict=False)
        except msgspec.ValidationError as error:
            raise KvLost("the hand-off is incomplete") from error

    async def pull(self) -> bytes:
        """The digest; the prefill worker has let go of it then. Raises `KvLost`."""
        digest = (await self._ask("pull")).digest
        if digest is None:
            raise KvLost(f"{self.request_id} cannot be pulled")
        return digest

    async def notify(self, op: Notice) -> None:
        """Tell the prefill worker whether somebody will pull. Raises `KvLost` if it cannot be told."""
        await self._ask(op)

    async def _ask(self, op: Literal["pull"] | Notice) -> _Reply:
        blocks = [block for group in self.block_ids for block in group]
        ask = _Ask(op, self.engine_id, self.request_id, blocks)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return _REPLY.decode(await _exchange(self.host, self.port, _encode(ask)))
        except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            raise KvLost(f"no answer from {self.host}:{self.port}") from error


@asynccontextmanager
async def serve(
    host: str,
    port: int,
    pull: Callable[[str, str, list[int]], bytes | None],
    notify: Callable[[Notice, str, str], None],
) -> AsyncIterator[int]:
    """Listen while the block runs; its value is the port. `pull` and `notify` get engine and request id."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            ask = _ASK.decode(await reader.readline())
            reply = _Reply()
            if ask.op == "pull":
                reply.digest = pull(ask.engine_id, ask.request_id, ask.block_ids)
            else:
                notify(ask.op, ask.engine_id, ask.request_id)
            writer.write(_encode(reply) + b"\n")
            await writer.drain()
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # a broken peer is the peer's problem
        finally:
            writer.close()

    server = await asyncio.start_server(answer, host, port, limit=_MAX_LINE)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _exchange(host: str, port: int, line: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port, limit=_MAX_LINE)
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
