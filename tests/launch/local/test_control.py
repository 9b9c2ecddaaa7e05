"""Commands come as lines at a socket; whoever leaves has given up."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from launch.local.control import MAX_LINE, Caller, CommandFailed, Request, commands_taken
from launch.local.run_state import SOCKET

Use = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def handle(request: Request, caller: Caller) -> dict[str, Any]:
    if request.get("command") == "fail":
        raise CommandFailed("no")
    caller.say("so far")
    return {"done": request}


def taken(directory: Path, use: Use, handler: Any = handle) -> None:
    async def run() -> None:
        async with commands_taken(directory, handler):
            reader, writer = await asyncio.open_unix_connection(directory / SOCKET)
            try:
                await use(reader, writer)
            finally:
                writer.close()
        assert not (directory / SOCKET).exists()

    asyncio.run(run())


async def answers(reader: asyncio.StreamReader) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await reader.read()).splitlines()]


def test_a_command_and_its_answers(tmp_path: Path) -> None:
    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"command": "x"}\n')
        assert await answers(reader) == [{"say": "so far"}, {"done": {"command": "x"}}]

    taken(tmp_path, use)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"command": "fail"}\n', "no"),
        (b"\n", "a command is a line of JSON"),
        (b"\xff\n", "a command is a line of JSON"),
        (b"[1]\n", "a command is an object"),
        (b"x" * (MAX_LINE + 100), "a command is a line of JSON"),
    ],
)
def test_what_is_refused(tmp_path: Path, line: bytes, says: str) -> None:
    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line)
        assert await answers(reader) == [{"error": says}]

    taken(tmp_path, use)


def test_only_its_owner_can_connect(tmp_path: Path) -> None:
    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
        writer.write(b"{}\n")
        assert len(await answers(reader)) == 2

    before = os.umask(0)
    try:
        taken(tmp_path, use)
        assert os.umask(0) == 0  # it is as it was
    finally:
        os.umask(before)


def test_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["a" * 50] * 4)
    directory.mkdir(parents=True)

    async def run() -> None:
        async with commands_taken(directory, handle):
            assert (directory / SOCKET).is_socket()

    asyncio.run(run())


def test_whoever_leaves_has_given_up(tmp_path: Path) -> None:
    noticed = asyncio.Event()

    async def waiting(request: Request, caller: Caller) -> dict[str, Any]:
        while not caller.is_gone:  # noqa: ASYNC110  # as operations ask
            await asyncio.sleep(0.01)
        noticed.set()
        return {}

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"{}\n")
        writer.close()
        await asyncio.wait_for(noticed.wait(), 60)

    taken(tmp_path, use, waiting)


def test_what_is_under_way_is_cancelled_at_the_end(tmp_path: Path) -> None:
    ended: list[str] = []

    async def run() -> list[dict[str, Any]]:
        async with commands_taken(tmp_path, forever):
            reader, writer = await asyncio.open_unix_connection(tmp_path / SOCKET)
            writer.write(b"{}\n")
            assert await reader.readline() == b'{"say": "begins"}\n'
        found = await answers(reader)
        writer.close()
        return found

    async def forever(request: Request, caller: Caller) -> dict[str, Any]:
        caller.say("begins")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("brought to an end")
        return {}

    assert asyncio.run(run()) == [{"error": "`baton up` is being stopped"}]
    assert ended == ["brought to an end"]
