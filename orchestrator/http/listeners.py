"""Every process of the orchestrator runs on these listeners and servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any, Literal, Protocol, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from orchestrator.config.options import OrchestratorConfig, split_address
from orchestrator.errors import StartError
from orchestrator.http.asgi_app import AsgiApp
from orchestrator.http.connection import HttpProtocol, Shared
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.tls import Certificate, certificate_of
from orchestrator.http.tls_listener import TlsListener

TICK_S = 0.1  # how soon a server sees that something has changed, as in uvicorn
ADMIN_CONNECTIONS = 32  # of the descriptors that a process keeps for itself
CLOSE_S = 1  # from the end of draining: for connections to be closed

_log = logging.getLogger("baton.serving")


def uvicorn_config(
    app: Any,
    config: OrchestratorConfig,
    protocols: Protocols | None = None,
    *,
    random: Random,
    listen: str | None = None,
    lifespan: Literal["on", "off", "auto"] = "off",
    certificate: Certificate | None = None,
) -> uvicorn.Config:
    """Return how uvicorn serves the ASGI 3 application `app` on `listen`, else on the data plane's address.

    `protocols` makes the connections; if not given, they have the limits of `config` and hand every request
    to `app`. `random` makes request ids and the jitter of `limit_max_requests`. `certificate` is the one
    of `config`, if whoever calls is to renew it. Raises `StartError`.
    """
    protocols = protocols or Protocols(Shared(ServerLimits.of(config, listen), IdSource(random)))
    host, port = split_address(listen or config.listen)
    protocols.certificate = certificate = certificate or certificate_of(config)
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        interface="asgi3",
        loop="uvloop",
        # uvicorn's type wants a class; it calls what it is given, as `Protocols.__call__` has it.
        http=cast("Any", protocols),
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=config.backlog,
        limit_max_requests=_with_jitter(config, random),
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=config.timeout_graceful_shutdown,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )


def _with_jitter(config: OrchestratorConfig, random: Random) -> int | None:
    if config.limit_max_requests is None:
        return None
    return config.limit_max_requests + random.randint(0, config.limit_max_requests_jitter)


class Protocols:
    """This makes the connections of one server (`uvicorn.Config.http`)."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.certificate: Certificate | None = None  # with which the listener serves

    def __call__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpProtocol:
        if not config.loaded:
            config.load()
        return HttpProtocol(
            self.shared,
            AsgiApp(config.loaded_app, app_state).serve,
            server_state,
            _loop or asyncio.get_running_loop(),
            keep_alive_s=cast("Any", config).timeout_keep_alive,  # uvicorn asks for whole seconds
            max_requests=config.limit_max_requests,
        )

    def close_after_answers(self) -> None:
        """Let every connection, also those to come, end with its next answer; idle ones stay until then."""
        self.shared.close_after_answers()

    def limit(self, limits: ServerLimits) -> None:
        """Bound the connections that are made from now on."""
        self.shared.limits = limits


class Server(uvicorn.Server):
    """This server leaves signals alone: several run in a process, and one signal is for all of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        certificate = cast("Protocols", self.config.http_protocol_class).certificate
        if sockets is None or certificate is None:
            await super().startup(sockets)
            return
        await self.lifespan.startup()
        listeners = [self._tls_listener(sock, certificate) for sock in sockets]
        self.servers = cast("list[asyncio.Server]", listeners)  # uvicorn only closes them
        self.started = True

    def _tls_listener(self, sock: socket.socket, certificate: Certificate) -> TlsListener:
        protocols = cast("Protocols", self.config.http_protocol_class)
        shared = protocols.shared
        sock.listen(self.config.backlog)
        return TlsListener(
            sock,
            lambda: cast("asyncio.Protocol", protocols(self.config, self.server_state, self.lifespan.state)),
            certificate,
            shared.crowd,
            shared.limits.header_timeout_s,
        )

    def stop(self) -> None:
        """End in good order. This can be repeated."""
        self.should_exit = True

    def cut(self) -> None:
        """Do not wait for open requests any more."""
        self.force_exit = True
        self.stop()

    def stop_or_cut(self) -> None:
        """Do what a signal asks for: the first to stop, the second to cut."""
        if self.should_exit:
            self.cut()
        else:
            self.stop()


class Draining(Protocol):
    """This serves requests behind a `PublicServer`, and is told of its end step by step."""

    def announce_drain(self) -> None:
        """Answer `/ready` with 503 from now on; requests are still taken."""

    def refuse_requests(self) -> None:
        """Answer new requests with 503 from now on."""

    def end_requests(self) -> None:
        """End the open requests with an error."""


class PublicServer(Server):
    """The public server drains before it closes: open requests go on, and new connections still get answers.

    A listener closed at once would leave load balancers to find out by refused connections, and
    clients without the `retry-after` that tells them what to do.
    """

    def __init__(self, config: uvicorn.Config, requests: Draining, options: OrchestratorConfig) -> None:
        super().__init__(config)
        self._requests = requests
        self._grace_s = options.timeout_graceful_shutdown
        self.notice_s = options.drain_notice_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain()
        self.config.timeout_graceful_shutdown = CLOSE_S
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Wait until nothing is owed to any client, but not longer than the grace time."""
        began = asyncio.get_running_loop().time()
        _log.info("draining: open requests have %g s", self._grace_s)
        self._requests.announce_drain()
        self.close_after_answers()
        await self._wait(lambda: True, began + self.notice_s)
        self._requests.refuse_requests()
        await self._wait(self._is_busy, began + self._grace_s)
        self._requests.end_requests()

    def close_after_answers(self) -> None:
        """Let connections end as they come to their next answer: then nobody asks on one that is closed."""
        cast("Protocols", self.config.http_protocol_class).close_after_answers()

    def _is_busy(self) -> bool:
        return any(cast("HttpProtocol", connection).is_busy for connection in self.server_state.connections)

    async def _wait(self, is_to_wait: Callable[[], bool], until: float) -> None:
        """Wait while the condition holds and nobody is in a hurry; uvicorn tells of neither."""
        loop = asyncio.get_running_loop()
        while is_to_wait() and loop.time() < until and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)


@contextlib.asynccontextmanager
async def admin_served(
    app: FastAPI, options: OrchestratorConfig, random: Random, certificate: Certificate | None = None
) -> AsyncIterator[None]:
    """Serve the admin listener, if there is to be one, while this is entered; also while requests drain.

    What limits clients does not limit whoever looks after them. `certificate` is as `uvicorn_config` has it.
    Raises `StartError`.
    """
    if options.admin is None:
        yield
        return
    update = {"limit_concurrency": None, "limit_max_requests": None, "max_connections": ADMIN_CONNECTIONS}
    unlimited = options.model_copy(update=update)
    with bound(options.admin, options.backlog) as listener:
        made = uvicorn_config(app, unlimited, random=random, listen=options.admin, certificate=certificate)
        server = Server(made)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.cut()
            await serving


@contextlib.contextmanager
def bound(address: str, backlog: int) -> Iterator[socket.socket]:
    """Open a socket that listens on `HOST:PORT`, and close it at the end. Raises `StartError`."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from error
    with listener:
        yield listener
