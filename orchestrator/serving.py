"""Listeners, servers and signals: what every process of the orchestrator runs on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from random import Random

import uvicorn
from fastapi import FastAPI

from orchestrator.auth import KeyFileError, KeyRing
from orchestrator.config import OrchestratorConfig, split_address
from orchestrator.server import uvicorn_config


class StartError(Exception):
    """The orchestrator cannot start; the message says what to change."""


class Server(uvicorn.Server):
    """Leaves signals alone: several servers run in a process, and one signal is for all of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Drain, within the config's `timeout_graceful_shutdown`. Repeatable."""
        self.should_exit = True

    def cut(self) -> None:
        """Do not wait for open requests any more."""
        self.force_exit = True
        self.stop()


def admin_server(app: FastAPI, options: OrchestratorConfig, listen: str, random: Random) -> Server:
    """For the admin listener: what limits clients does not limit whoever looks after them."""
    unlimited = options.model_copy(update={"limit_concurrency": None, "limit_max_requests": None})
    return Server(uvicorn_config(app, unlimited, random=random, listen=listen))


def load_keys(options: OrchestratorConfig) -> KeyRing | None:
    """None if everybody may ask. Raises `StartError`."""
    if options.api_keys_file is None:
        return None
    try:
        return KeyRing.load(options.api_keys_file)
    except (OSError, KeyFileError) as error:
        raise StartError(f"api_keys_file: {error}") from error


@contextlib.contextmanager
def bound(address: str, backlog: int) -> Iterator[socket.socket]:
    """A socket that listens on `HOST:PORT`, closed at the end. Raises `StartError`."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from error
    with listener:
        yield listener


@contextlib.contextmanager
def on_signals(
    callback: Callable[[], None], numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Have the running event loop call `callback` for each signal."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
