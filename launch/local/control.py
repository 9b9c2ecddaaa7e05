"""`baton up` takes commands at a socket in its run's directory, which only the user who started it can open.

A connection is one command: a line of JSON with `command` and what belongs to it.

    {"command": "key"}                                          -> {"key": "..."}
    {"command": "restart", "workers": [NAME, ...], "is_forced": false, "timeout_s": 600}
    {"command": "scale", "model": "m", "role": "decode", "count": 3, "is_forced": false, "timeout_s": 600}

Answers are lines of JSON: `{"say": TEXT}` while it goes on; then one that has the result, as `{"done": ...}`,
or says why there is none, as `{"error": TEXT}`. Whoever closes the connection gives up what was asked for: a
worker that is being restarted is brought back, and no other one follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from launch.local.run_state import SOCKET

MAX_LINE = 1024 * 1024  # bytes: names of thousands of workers


class CommandFailed(Exception):
    """A command was refused, or has failed; the message says why."""


Request = dict[str, Any]
Say = Callable[[str], None]
Handler = Callable[[Request, "Caller"], Awaitable[dict[str, Any]]]  # raises `CommandFailed`


class Caller:
    """Somebody waits for the answers to a command."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.is_gone = False  # it has given up

    def say(self, text: str) -> None:
        """Tell how it goes on."""
        self.answer({"say": text})

    def answer(self, document: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(document).encode() + b"\n")


@contextlib.asynccontextmanager
async def commands_taken(directory: Path, handle: Handler) -> AsyncIterator[None]:
    """Have `handle` carry out commands until the block ends; those under way are cancelled then.

    Raises `OSError` if the socket cannot be made.
    """
    under_way: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(reader, writer, handle))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    server = await asyncio.start_unix_server(serve, sock=_listening(directory), limit=MAX_LINE)
    try:
        yield
    finally:
        server.close()
        for task in [*under_way]:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        (directory / SOCKET).unlink(missing_ok=True)


def _listening(directory: Path) -> socket.socket:
    """Return a socket that only its owner can connect to, whatever the directory's path is long."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    before = os.umask(0o177)
    try:
        made.bind(f"/proc/self/fd/{place}/{SOCKET}")
    except OSError:
        made.close()
        raise
    finally:
        os.umask(before)
        os.close(place)
    return made


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handler) -> None:
    caller = Caller(writer)
    try:
        request = await _request(reader)
        watching = asyncio.create_task(_watch(reader, caller))
        try:
            caller.answer(await handle(request, caller))
        finally:
            watching.cancel()
    except CommandFailed as error:
        caller.answer({"error": str(error)})
    except asyncio.CancelledError:
        caller.answer({"error": "`baton up` is being stopped"})
        raise
    except Exception as error:  # a bug of ours must not leave the caller without an answer
        caller.answer({"error": f"`baton up` could not do this: {error!r}"})
    finally:
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()


async def _request(reader: asyncio.StreamReader) -> Request:
    try:
        request = json.loads(await reader.readline())
    except (ValueError, asyncio.LimitOverrunError, ConnectionError) as error:
        raise CommandFailed("a command is a line of JSON") from error
    if not isinstance(request, dict):
        raise CommandFailed("a command is an object")
    return request


async def _watch(reader: asyncio.StreamReader, caller: Caller) -> None:
    """Notice that the caller has left."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(4096):
            pass
    caller.is_gone = True
