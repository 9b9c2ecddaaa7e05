"""The HTTP/1.1 server is a protocol class for uvicorn with the deadlines and limits that uvicorn lacks.

uvicorn keeps what it does well: sockets, TLS, signals, lifespan, graceful shutdown. The protocol is our own
rather than a subclass of uvicorn's, because nearly every method would differ and none of uvicorn's plain-text
answers may be left reachable; it relies only on what `uvicorn.Server` does with a protocol class.

A connection has a reader, which makes requests of what comes (`reader.py`; `head.py` judges them,
`backlog.py` holds what has to wait), an exchange for each request (`http_exchange.py`), and deadlines
(`deadlines.py`); how it ends is in `ending.py`. The rest is here: in which order requests are answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, cast

from uvicorn.server import ServerState

from orchestrator.errors import TooManyConnections
from orchestrator.http.carrier import Addresses, OnRefused
from orchestrator.http.cors import Cors
from orchestrator.http.crowd import Crowd, Guest
from orchestrator.http.deadlines import Deadlines, Sweep
from orchestrator.http.ending import Ending
from orchestrator.http.exchange import FormError, Handler, form_error
from orchestrator.http.held import HeldBytes
from orchestrator.http.http_exchange import HttpExchange, refuse, run
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.reader import Reader

NO_HANDLERS: Final[Mapping[str, Handler]] = {}
MAX_PIPELINED: Final = 64  # requests in one read; the connection closes after the last one taken


class Shared:
    """The connections of one server share this."""

    def __init__(
        self,
        limits: ServerLimits,
        ids: IdSource,
        on_refused: OnRefused | None = None,
        handlers: Mapping[str, Handler] = NO_HANDLERS,
        cors: Cors | None = None,
        held: HeldBytes | None = None,
        form_error: FormError = form_error,
    ) -> None:
        """Requests for the paths in `handlers` go there instead of to the application.

        `on_refused` is told of every error that the server itself answers, with the request's id and path;
        neither a handler nor the application ever sees those requests; `form_error` makes what their clients
        get. With `cors` pages of other sites may ask. `held` bounds what the requests hold, if there is a
        bound.
        """
        self.limits = limits  # of the connections that are made from now on
        self.ids = ids
        self.on_refused = on_refused
        self.handlers = handlers
        self.form_error = form_error
        self.cors = cors
        self.sweep = Sweep(limits.sweep_s)
        self.crowd = Crowd(limits.max_connections)
        self.held = held or HeldBytes()
        self.held.unsent = self.unsent
        self.is_ending = False

    @property
    def open(self) -> dict[Guest, None]:
        return self.crowd.open

    def unsent(self) -> int:
        """Return the bytes of answers that wait for clients which take them slowly."""
        return sum(guest.unsent() for guest in self.crowd.open if guest.is_write_paused)

    def close_after_answers(self) -> None:
        """Let every connection, also those to come, end with its next answer; idle ones stay until then."""
        self.is_ending = True
        for connection in self.crowd.open:
            connection.is_ending = True


class HttpProtocol(Ending):
    """A client connection is an `asyncio.Protocol`, which `uvicorn.Server` shuts down.

    A client that closes only its sending half counts as gone: HTTP clients do not do that, and a closed
    connection looks the same.
    """

    def __init__(
        self,
        shared: Shared,
        otherwise: Handler,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        *,
        keep_alive_s: float,
        max_requests: int | None,
    ) -> None:
        """`otherwise` answers requests whose paths have no handler, `state` is kept up to date for uvicorn.
        The connection closes when it is idle for `keep_alive_s`, and the server at `max_requests`."""
        self.loop = loop
        self.tasks = state.tasks
        self.ids = shared.ids
        self.date = shared.sweep.date
        self.held = shared.held
        self.on_refused = shared.on_refused
        self.form_error = shared.form_error
        self.is_ending = shared.is_ending
        self.is_write_paused = False
        self._shared = shared
        self._handlers = shared.handlers
        self._cors = shared.cors
        self._otherwise = otherwise
        self._state = state
        self.max_requests = max_requests
        self._deadlines = Deadlines(loop, shared.limits, keep_alive_s)
        self._reader = Reader(self, shared.limits, self._deadlines)

        self.active: HttpExchange | None = None
        self._queue: deque[HttpExchange] = deque()  # behind the active one
        self._is_next_due = False
        self._is_silent = True  # it has not sent a whole request yet
        self._has_room = True  # if not, it is closed behind its first answer
        self._is_closing = False
        self._is_lost = False

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = carrying = cast("asyncio.Transport", transport)
        self.write = carrying.write
        self.writelines = carrying.writelines
        self.addresses = _addresses(transport)
        # uvicorn types the set by its own protocols; it calls nothing but shutdown().
        self._state.connections.add(cast("Any", self))
        self._reader.connected(carrying)
        self._deadlines.connected(carrying)
        self._shared.sweep.add(self._deadlines, self.expire)
        self._has_room = self._shared.crowd.enter(self, self.loop.time())

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._state.connections.discard(cast("Any", self))
        self._shared.crowd.leave(self)
        self._shared.sweep.discard(self._deadlines)
        self._leave()
        self._reader.close()

    def eof_received(self) -> None:
        self._reader.is_deaf = True
        self._is_closing = True
        self._deadlines.await_writes()
        self._leave()  # the transport closes by itself, once what was written is sent

    def _leave(self) -> None:
        active, self.active = self.active, None
        self._drop_queue()
        self._reader.incoming = None
        self._reader.backlog.clear()
        if active is not None:
            active.leave()

    def data_received(self, data: bytes) -> None:
        reader, active = self._reader, self.active
        backlog = reader.backlog
        if reader.is_deaf:
            return
        if backlog.size or (active is not None and active.body.is_received):
            reader.hold(data)
        elif len(data) > backlog.max_step:
            reader.feed_much(data)
        else:
            reader.feed(data)

    def pause_writing(self) -> None:
        self.is_write_paused = True
        self._deadlines.await_writes()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self.active is not None:
            self.active.writable()
        elif not self._is_closing:
            self._rest()

    # --- the crowd's side

    @property
    def is_resting(self) -> bool:
        active = self.active
        is_answered = active is None or active.is_complete
        return is_answered and not self._transport.get_write_buffer_size()

    # --- the server's side

    @property
    def is_busy(self) -> bool:
        """Return whether a request is in progress, or a part of its answer is pending."""
        return self.active is not None or self._transport.get_write_buffer_size() > 0

    def shutdown(self) -> None:
        """Close as soon as the request in progress is answered."""
        self.is_ending = True
        active = self.active
        if self._is_closing:
            self._transport.abort()
        elif active is None or active.is_complete:
            self._close()

    # --- the exchange's side

    def pause_reading(self) -> None:
        self._reader.pause()

    def resume_reading(self) -> None:
        self._reader.resume()

    def await_whole_body(self) -> None:
        self._deadlines.await_whole_body()

    def answered(self) -> None:
        self._state.total_requests += 1
        exchange = self.active
        if exchange is None:
            return
        if exchange.body.counted:  # the handler has not asked for it
            exchange.body.release()
        if not exchange.keep_alive or self.is_ending:
            self._end(exchange)
        elif exchange.body.is_received:
            self.advance()
        else:
            exchange.body.discard()
            self._reader.resume()

    # --- one after the other

    def is_last(self) -> bool:
        """Return whether uvicorn is about to stop at `max_requests`.

        This is early enough for every open connection to be told so with an answer before uvicorn closes
        them.
        """
        return self._state.total_requests + len(self._state.connections) >= cast("int", self.max_requests)

    def accept(self, exchange: HttpExchange) -> None:
        if self.active is None:
            self._start(exchange)
        elif len(self._queue) < MAX_PIPELINED:
            self._queue.append(exchange)
        else:
            self._queue[-1].keep_alive = False
            self._reader.is_deaf = True
            self._reader.incoming = None

    def _start(self, exchange: HttpExchange) -> None:
        self.active = exchange
        if self._is_silent:
            self._is_silent = False
            self._shared.crowd.silent.pop(self, None)
            if not self._has_room:
                self._turn_away(exchange)
        if self._cors is not None and self._cors.answers(exchange):
            return
        if exchange.refusal is not None:
            exchange.body.discard()
            refuse(exchange, exchange.refusal)
            return
        handler: Handler | None = self._handlers.get(exchange.head.target.path)
        # Not by `create_task`: it makes up a name for each, which nobody reads.
        exchange.task = task = asyncio.Task(
            run(exchange, handler or self._otherwise), loop=self.loop, name="request"
        )
        self.tasks.add(task)

    def _turn_away(self, exchange: HttpExchange) -> None:
        """Have this request be the last, and refused unless a probe asks: it is not to think us dead."""
        exchange.keep_alive = False
        is_probe = exchange.head.target.path in self._shared.limits.probes
        if exchange.refusal is None and not is_probe:
            exchange.refusal = TooManyConnections("all connections to this server are in use")

    def advance(self) -> None:
        if self._queue or self._reader.backlog.size:
            self.schedule()
        else:
            self._rest()

    def schedule(self) -> None:
        if not self._is_next_due:
            self._is_next_due = True
            self.loop.call_soon(self._next)

    def _next(self) -> None:
        """Go on with what has arrived already: the next request, or more of the present one."""
        self._is_next_due = False
        if self._is_lost or self._is_closing:
            return
        active = self.active
        if active is not None and active.is_complete and active.body.is_received:
            self._start_next()
        if self._reader.backlog.size:
            self._reader.read_on()

    def _start_next(self) -> None:
        if not self._queue:
            self._rest()
            return
        self._start(self._queue.popleft())
        incoming = self._reader.incoming
        if incoming is not None and incoming is self.active:
            self._reader.await_body()

    def _rest(self) -> None:
        """Wait for the next request: none is in progress."""
        self.active = None
        if self.is_write_paused:
            self._deadlines.await_writes()
        else:
            self._deadlines.rest(self._reader.in_head)

    # --- ending

    def _end(self, exchange: HttpExchange) -> None:
        self._drop_queue()
        self._reader.backlog.clear()
        exchange.body.discard()
        if exchange.body.is_received and not self._reader.is_deaf:
            self._close()
        else:
            self.linger()

    def _drop_queue(self) -> None:
        for exchange in self._queue:
            exchange.body.discard()
        self._queue.clear()


def _addresses(transport: asyncio.BaseTransport) -> Addresses:
    scheme = "https" if transport.get_extra_info("sslcontext") else "http"
    client, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    return Addresses(_address(client), _address(server), scheme)


def _address(name: object) -> tuple[str, int] | None:
    """Return host and port of a socket's name; None for Unix sockets."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
