"""Handshakes that do not end: they are cut off in time, and make room for others."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import pytest

from orchestrator.config.options import LimitsConfig, OrchestratorConfig, TlsConfig
from orchestrator.http import tls_listener
from orchestrator.http.listeners import Server, bound, uvicorn_config
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.raw_http import (
    GET,
    PATIENCE_S,
    RawClient,
    app_of,
    echo,
    logs_errors,
    no_errors_logged,
    run,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures


@asynccontextmanager
async def serving_tls(**options: Any) -> AsyncIterator[tuple[Server, int]]:
    tls = TlsConfig(cert=os.fspath(CERT), key=os.fspath(KEY))
    config = OrchestratorConfig(listen="127.0.0.1:0", allowed_hosts=["a"], tls=tls, **options)
    server = Server(uvicorn_config(app_of(echo), config, random=Random(1)))
    with bound(config.listen, config.backlog) as listener:
        port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield server, port
        finally:
            server.cut()
            await task


async def connected(port: int, stack: AsyncExitStack, *, is_silent: bool = False) -> RawClient:
    context = None if is_silent else ssl.create_default_context(cafile=CERT)
    made = RawClient(*await asyncio.open_connection("localhost", port, family=2, ssl=context))
    stack.push_async_callback(made.close)
    return made


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_half_a_handshake_ends_after_the_time_of_a_head(beginning: bytes, run: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            limits = LimitsConfig(header_timeout_s=0.3)
            _, port = await stack.enter_async_context(serving_tls(limits=limits))
            client = await connected(port, stack, is_silent=True)
            client.send(beginning)
            async with asyncio.timeout(PATIENCE_S):
                await client.rest()
            other = await connected(port, stack)
            assert (await other.ask(GET)).status == 200

    run(main)


def test_silent_handshakes_make_room_for_others(run: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            limits = LimitsConfig(header_timeout_s=3600)
            _, port = await stack.enter_async_context(serving_tls(limits=limits, max_connections=4))
            known = await connected(port, stack)
            assert (await known.ask(GET)).status == 200
            silent = [await connected(port, stack, is_silent=True) for _ in range(20)]
            for client in silent[:-4]:
                await client.rest()
            other = await connected(port, stack)
            assert (await other.ask(GET)).status == 200
            assert (await known.ask(GET)).status == 200

    run(main)


def test_accepting_goes_on_when_there_are_descriptors_again(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_listener, "PAUSE_S", 0.05)
    lacking = [OSError(errno.EMFILE, "Too many open files")] * 3

    class Listener:
        """A socket that lacks descriptors at first."""

        def __init__(self, sock: Any) -> None:
            self._sock = sock

        def accept(self) -> Any:
            if lacking:
                raise lacking.pop()
            return self._sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    make = tls_listener.TlsListener.__init__

    def made(self: Any, listener: Any, *arguments: Any) -> None:
        make(self, Listener(listener), *arguments)

    monkeypatch.setattr(tls_listener.TlsListener, "__init__", made)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            _, port = await stack.enter_async_context(serving_tls())
            client = await connected(port, stack)
            assert (await client.ask(GET)).status == 200
            assert lacking == []

    run(main)
