"""A worker under uvicorn serves many requests on one connection, in frames (`orchestrator/wire/streams.py`).

    app = FastAPI()
    add_streams(app)

Any other ASGI application: `Streams(app)`, where the route for `UPGRADE_PATH` answers as `consent` does.

The upgrade is answered by the application's own route, behind its own middleware, so that a key is asked for
there as anywhere. Where it answers 101, the connection is taken over from uvicorn's HTTP protocol. Every
stream is then a call of the application that uvicorn serves, with the scope that uvicorn would make, so that
nothing in it can tell a stream from a connection of its own. What is sent in one turn of the event loop
leaves in one write.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import deque
from typing import Any, ClassVar, Final, NoReturn
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

from orchestrator.wire.headers import Fields, fields_of, header_block
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    HEADER,
    HEADER_SIZE,
    LAST,
    LEAVE,
    MAX_CREDIT,
    MAX_FIELDS,
    MAX_PAYLOAD,
    MAX_STREAMS,
    OPEN,
    PING,
    RESET,
    RESET_BROKEN,
    RESET_REFUSED,
    U16,
    U32,
    UPGRADE_PATH,
    VERSION,
    WINDOW,
    FrameError,
    FrameReader,
    credit,
    frame,
    reset,
)

# The heads of all requests of a connection may take so many bytes of memory: more streams are refused. So may
# the bodies that their application has not asked for: nothing is read until it has.
MOST_HEADS: Final = 32 * 1024 * 1024
MOST_UNREAD: Final = 16 * 1024 * 1024
# So many bytes may wait for a peer that does not read, but asks for answers; those of the application do not
# count, for it waits where the transport is full.
MOST_UNSENT: Final = 1024 * 1024
_FIELD: Final = 160  # bytes of memory that each field takes beside its text
_MOST_JOINED: Final = 64 * 1024  # bytes that wait for the end of the turn: a transport is full at as many
_END_S: Final = 2.0  # within which a peer has to close a connection that has come to its end
_IDLE_S: Final = 60  # after which the kernel asks whether an orchestrator is still there

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST: Final = re.compile(
    rb"(%b) (/[\x21-\x7e]*)\r\n((?:%b: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)" % (_TOKEN, _TOKEN)
)
_OF_ITS_CONNECTION: Final = (b"connection", b"keep-alive", b"transfer-encoding")  # no field of a stream's

_UPGRADED: Final = (
    "The connection from %s carries many requests now: uvicorn did not know this upgrade, but we do."
)

# What is read of uvicorn's HTTP protocol; one without these cannot be taken over.
_NEEDED: Final = (
    "access_log",
    "access_logger",
    "app",
    "app_state",
    "asgi_version",
    "client",
    "connections",
    "flow",
    "limit_concurrency",
    "logger",
    "loop",
    "root_path",
    "scheme",
    "server",
    "server_state",
    "tasks",
)


# --- the upgrade ----------------------------------------------------------------------------------------


def add_streams(app: FastAPI, wrapper: type[Streams] | None = None) -> None:
    """Let `app` take connections for many requests; a `wrapper` of one's own may make other `Connection`s of
    them. Raises `RuntimeError` if the app serves already.
    """
    if app.middleware_stack is not None:
        raise RuntimeError("streams cannot be added to an application that serves")
    build, wrapper = app.build_middleware_stack, wrapper or Streams
    app.build_middleware_stack = lambda: wrapper(build())  # type: ignore[method-assign]
    app.add_api_route(UPGRADE_PATH, consent, methods=["GET"], include_in_schema=False)


async def consent(request: Request) -> Response:
    """Answer 101 to an upgrade to our version, which `Streams` makes true; 426 to anything else."""
    tokens = [token.strip().lower() for token in request.headers.get("connection", "").split(",")]
    if "upgrade" in tokens and request.headers.get("upgrade", "").encode() == VERSION:
        return Response(status_code=101)
    return Response(f"this server speaks {VERSION.decode()}", 426, {"upgrade": VERSION.decode()})


class Streams:
    """This is the outermost wrapper of an ASGI application."""

    connection: ClassVar[type[Connection]]  # what takes over; set below

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) == UPGRADE_PATH:
            await self._upgrade(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _upgrade(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the application, and take the connection over if it consents; else its answer is the answer."""
        consented = False

        async def answer(message: Message) -> None:
            nonlocal consented
            consented = consented or message.get("status") == 101
            if not consented:
                await send(message)

        await self._app(scope, receive, answer)
        if consented:
            await self._take_over(scope, receive, send)

    async def _take_over(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        protocol = _http_protocol(cycle)
        if protocol is None:
            await Response("only a connection of uvicorn's can carry streams", 501)(scope, receive, send)
        elif not cycle.disconnected:  # type: ignore[union-attr]  # it is, if the client has left
            cycle.disconnected = True  # type: ignore[union-attr]  # uvicorn wants no answer any more
            connection = self.connection(protocol)
            connection.begin(scope)
            if not cycle.keep_alive:  # type: ignore[union-attr]  # the server has been told to stop meanwhile
                connection.shutdown()


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root else path


def _http_protocol(cycle: Any) -> Any | None:
    """Return uvicorn's HTTP protocol behind a request, be it by httptools or h11; None for another server."""
    transport = getattr(cycle, "transport", None)
    if not (
        hasattr(cycle, "disconnected") and hasattr(cycle, "keep_alive") and hasattr(transport, "set_protocol")
    ):
        return None
    protocol = transport.get_protocol()  # type: ignore[union-attr]
    return protocol if all(hasattr(protocol, name) for name in _NEEDED) else None


# --- the connection -------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """It takes the place of uvicorn's HTTP protocol, for the transport and for the server, which calls
    `shutdown` and waits for `connections` to be gone and `tasks` to be done.
    """

    def __init__(self, http: Any) -> None:
        """`http` is the protocol of uvicorn's whose place it takes."""
        self.http = http
        self.transport: asyncio.Transport = http.transport
        self.output = Output(self.transport, http.loop)
        self._reader = FrameReader(self._on_frame)
        self._streams: dict[int, Stream] = {}  # that are not over
        self._highest = 0  # number of a stream yet
        self._tasks = 0  # calls of the application; those of streams that are over may go on
        self._heads = 0  # bytes of theirs
        self._unread = 0  # bytes of bodies
        self._reads = True
        self._is_last = False  # no more streams are taken
        self._is_over = False  # frames are neither sent nor taken any more
        # A call was cancelled: a server that does so closes its event loop next, and fails where one is open.
        self.is_hurried = False
        self._limit: asyncio.TimerHandle | None = None  # while the peer is waited for, to close
        self._defaults: Any = None  # uvicorn's fields for each answer
        self._default_block = b""

    def __repr__(self) -> str:
        return f"<Connection from {self.peer}: {len(self._streams)} streams>"

    @property
    def peer(self) -> str:
        client = self.http.client
        return f"{client[0]}:{client[1]}" if client else "a local socket"

    def begin(self, scope: Scope) -> None:
        """Answer the upgrade, and speak frames from now on."""
        http = self.http
        http.connections.discard(http)
        http.connections.add(self)
        self.log_access(scope, 101)
        _ask_whether_alive(self.transport)
        switch = [(b"connection", b"Upgrade"), (b"upgrade", VERSION)]
        head = self._default_fields() + header_block(switch)
        self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n" + head + b"\r\n")
        self.transport.set_protocol(self)
        http.flow.resume_reading()  # h11 takes no more than the upgrade
        http.logger.info(_UPGRADED, self.peer)

    # --- what asyncio calls

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        try:
            self._reader.feed(data)
        except FrameError as error:
            self._fail(str(error))

    def eof_received(self) -> None:
        self._lose()  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self.http.connections.discard(self)
        if self._limit is not None:
            self._limit.cancel()
        self._lose()

    def pause_writing(self) -> None:
        self.output.pause()

    def resume_writing(self) -> None:
        self.output.resume()

    # --- what uvicorn's server calls

    def shutdown(self) -> None:
        """Take no more streams; the connection ends with the last one."""
        if not (self._is_last or self._is_over):
            self._is_last = True
            self.output.put(frame(LAST, 0))
            self._close_if_done()

    # --- what streams call

    def log_access(self, scope: Scope, status: int) -> None:
        """Log a request as uvicorn does."""
        http = self.http
        if http.access_log:
            path = get_path_with_query_string(scope)  # type: ignore[arg-type]
            http.access_logger.info(
                '%s - "%s %s HTTP/%s" %d',
                get_client_addr(scope),  # type: ignore[arg-type]
                scope["method"],
                path,
                scope["http_version"],
                status,
            )

    def head(self, status: int, fields: Fields) -> bytes:
        """Return the payload of a `HEAD`, with uvicorn's own fields. Raises `ValueError` for a wrong one."""
        if not 200 <= status <= 999:
            raise ValueError(f"an answer of status {status}")
        lower = ((name.lower(), value) for name, value in fields)
        own = header_block(field for field in lower if field[0] not in _OF_ITS_CONNECTION)
        block = self._default_fields() + own
        count = block.count(b"\n")
        if len(block) + U16.size > MAX_PAYLOAD or count > MAX_FIELDS:
            raise ValueError(f"an answer whose head has {len(block)} bytes in {count} fields")
        return U16.pack(status) + block

    def answer(self, data: bytes) -> None:
        """Send what the peer has provoked, unless it has provoked much and reads nothing of it."""
        self.output.put(data)
        if self.output.is_full and self.transport.get_write_buffer_size() > MOST_UNSENT:
            self._fail(f"more than {MOST_UNSENT} bytes of answers to them are not read")

    def note_unread(self, size: int) -> None:
        """Note that so many bytes came that wait for the application, or, if negative, that they do not any
        more.
        """
        self._unread += size
        if self._reads and self._unread > MOST_UNREAD:
            self._reads = False
            self.transport.pause_reading()
        elif not self._reads and self._unread <= MOST_UNREAD // 2 and not self._is_over:
            self._reads = True
            self.transport.resume_reading()

    def break_off(self, number: int) -> None:
        """End a stream as broken, unless it is over."""
        if (stream := self._streams.get(number)) is not None:
            stream.break_off()

    def forget(self, number: int) -> None:
        """Note that a stream is over."""
        if self._streams.pop(number, None) is not None:
            self._close_if_done()

    def note_end(self, head_size: int) -> None:
        """Note that the application has come back from a call."""
        self._tasks -= 1
        self._heads -= head_size

    # --- frames

    def _on_frame(self, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        if self._is_over:
            return
        if kind == OPEN:
            self._open(number, is_last, payload)
        elif number == 0:
            self._on_ping(kind, is_last, payload)
        elif kind not in _FOR_STREAMS:
            _refuse(kind, number)
        elif number > self._highest:
            raise FrameError(f"a frame of kind {kind} for stream {number}, which was never opened")
        elif (stream := self._streams.get(number)) is not None:  # else it has crossed the end
            stream.on_frame(kind, is_last, payload)

    def _on_ping(self, kind: int, is_answer: bool, payload: bytes) -> None:
        if kind != PING or is_answer:  # we ask nothing
            _refuse(kind, 0)
        self.answer(frame(PING | END, 0, payload))

    def _open(self, number: int, is_last: bool, payload: bytes) -> None:
        if number <= self._highest:
            raise FrameError(f"stream {number} was opened after stream {self._highest}")
        self._highest = number
        head = _REQUEST.fullmatch(payload)
        if head is None:
            raise FrameError(f"a head of stream {number} that is none")
        size = len(payload) + payload.count(b"\n") * _FIELD
        if self._is_last or self._tasks >= MAX_STREAMS or self._heads + size > MOST_HEADS:
            self.answer(reset(number, RESET_REFUSED))
        else:
            self._start(Stream(self, number, self._scope(number, head), size), has_body=not is_last)

    def _scope(self, number: int, head: re.Match[bytes]) -> Scope:
        """Make the scope that uvicorn would make."""
        method, target, block = head.groups()
        raw_path, _, query = target.partition(b"?")
        path, http = raw_path.decode("ascii"), self.http
        return {
            "type": "http",
            "asgi": {"version": http.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": http.server,
            "client": http.client,
            "scheme": http.scheme,
            "root_path": http.root_path,
            "headers": [(name.lower(), value) for name, value in fields_of(block)],
            "state": self.state(number),
            "method": method.decode("ascii"),
            "path": http.root_path + (unquote(path) if "%" in path else path),
            "raw_path": http.root_path.encode("ascii") + raw_path,
            "query_string": query,
        }

    def state(self, number: int) -> dict[str, Any]:
        """Return a new state for the scope of a stream."""
        state: dict[str, Any] = self.http.app_state.copy()
        return state

    def _start(self, stream: Stream, *, has_body: bool) -> None:
        http = self.http
        app = _busy if self._is_busy() else http.app
        self._streams[stream.number] = stream
        self._tasks += 1
        self._heads += stream.head_size
        if not has_body:
            stream.on_frame(BODY, True, b"")
        task = http.loop.create_task(stream.run(app))
        http.tasks.add(task)
        task.add_done_callback(stream.on_done)

    def _is_busy(self) -> bool:
        """Tell whether uvicorn would answer 503 by its `limit_concurrency`."""
        http = self.http
        limit: int | None = http.limit_concurrency
        return limit is not None and (len(http.connections) >= limit or len(http.tasks) >= limit)

    # --- ends

    def _close_if_done(self) -> None:
        """Have the peer close the connection, after it has read all. To close it while frames of the peer's
        are on their way would have the kernel drop what is not sent yet.
        """
        if self._is_last and not self._streams and not self._is_over:
            self.output.flush()
            self.output.stop()
            self._is_over = True
            if self.is_hurried:
                self.transport.close()
                return
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._wait_for_close()

    def _wait_for_close(self) -> None:
        """Give the peer some time to close the connection, once it has taken all."""
        self._limit = self.http.loop.call_later(_END_S, self._close)

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():
            self._wait_for_close()
        else:
            self.transport.abort()

    def _fail(self, reason: str) -> None:
        self.http.logger.warning("A connection from %s was closed for bad frames: %s", self.peer, reason)
        self._lose()
        self.transport.abort()

    def _lose(self) -> None:
        """Tell all streams that their client has left."""
        self._is_over = True
        self.output.stop()
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.end()

    def _default_fields(self) -> bytes:
        """Return uvicorn's `server` and `date`, which it makes anew every second."""
        defaults = self.http.server_state.default_headers
        if defaults is not self._defaults:
            self._defaults = defaults
            self._default_block = header_block((name.lower(), value) for name, value in defaults)
        return self._default_block


Streams.connection = Connection

_FOR_STREAMS: Final = (BODY, RESET, LEAVE, CREDIT)


def _refuse(kind: int, number: int) -> NoReturn:
    raise FrameError(f"a frame of kind {kind} for stream {number}, which no orchestrator sends")


def _ask_whether_alive(transport: asyncio.Transport) -> None:
    """Have the kernel find out that a peer is gone without a word: nothing may be sent for hours."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("Service Unavailable", 503)(scope, receive, send)


class Output:
    """It joins what is sent in one turn of the event loop and writes it, in the order in which it was put."""

    __slots__ = ("_is_stopped", "_loop", "_pieces", "_size", "_transport", "_waiting", "is_full")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes | memoryview] = []
        self._size = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_stopped = False
        self.is_full = False  # the transport has enough: whoever can wait does

    def put(self, data: bytes) -> None:
        """Send a whole frame."""
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _MOST_JOINED:
            self.flush()  # so that the transport can say that it is full

    def put_data(self, kind: int, stream: int, payload: bytes | memoryview) -> None:
        """Send a frame of an answer's body."""
        pieces, size = self._pieces, len(payload)
        if not pieces:
            self._loop.call_soon(self.flush)
        pieces.append(HEADER.pack(size, kind, stream))
        pieces.append(payload)
        self._size += HEADER_SIZE + size
        if self._size >= _MOST_JOINED:
            self.flush()

    def flush(self) -> None:
        pieces = self._pieces
        if pieces and not (self._is_stopped or self._transport.is_closing()):
            self._transport.write(b"".join(pieces))
        pieces.clear()
        self._size = 0

    def stop(self) -> None:
        """Drop what is put from now on."""
        self._is_stopped = True
        self.resume()

    def pause(self) -> None:
        self.is_full = not self._is_stopped

    def resume(self) -> None:
        self.is_full = False
        self._wake_next()

    async def wait_for_room(self) -> None:
        """Wait until the transport is not full; those who wait take turns, a frame each."""
        wait = self._waiting.append
        while self.is_full:
            turn = self._loop.create_future()
            wait(turn)
            wait = self._waiting.appendleft  # another was quicker: it is still the first
            try:
                await turn
            finally:
                self._wake_next()  # who finds that there is no room left keeps the place

    def _wake_next(self) -> None:
        while self._waiting and not self.is_full:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


_START: Final = "http.response.start"
_BODY: Final = "http.response.body"


# --- a stream -------------------------------------------------------------------------------------------


class Stream:
    """It is one request, as an ASGI application is called with it."""

    __slots__ = (
        "_body",
        "_connection",
        "_consumed",
        "_credit",
        "_credited",
        "_event",
        "_expected",
        "_has_left",
        "_is_complete",
        "_is_over",
        "_left",
        "_more",
        "_output",
        "_scope",
        "_window",
        "head_size",
        "number",
    )

    def __init__(self, connection: Connection, number: int, scope: Scope, head_size: int) -> None:
        self.number = number
        self.head_size = head_size
        self._connection = connection
        self._output = connection.output
        self._scope = scope
        # The request.
        self._body: bytes | bytearray = b""  # what the application has not asked for yet
        self._more = True
        self._window = WINDOW  # bytes that may come
        self._consumed = 0  # bytes, since credit was given for them
        self._event = asyncio.Event()  # there is something for `receive`
        self._has_left = False  # the client
        # The answer.
        self._credit = WINDOW
        self._credited: asyncio.Future[None] | None = None  # awaited while there is no credit
        self._expected = _START  # what the application sends next
        self._is_complete = False
        self._is_over = False  # nobody wants more of it
        self._left: int | None = None  # bytes that are missing of its content-length

    @property
    def _has_begun(self) -> bool:
        return self._expected != _START

    def __repr__(self) -> str:
        return f"<Stream {self.number} {self._scope['method']} {self._scope['path']}>"

    # --- frames

    def on_frame(self, kind: int, is_last: bool, payload: bytes) -> None:
        if kind == BODY:
            self._take(payload, is_last)
        elif kind == CREDIT:
            self._add_credit(U32.unpack(payload)[0])
        elif kind == LEAVE:
            self.leave()
        else:
            self._connection.forget(self.number)
            self.end()

    def _take(self, payload: bytes, is_last: bool) -> None:
        if not self._more:
            raise FrameError(f"a body of stream {self.number} that goes on after its end")
        self._window -= len(payload)
        if self._window < 0:
            raise FrameError(f"{-self._window} bytes of stream {self.number} beyond its credit")
        self._more = not is_last
        self._keep(payload)
        self._event.set()

    def _keep(self, payload: bytes) -> None:
        if not self._body:
            self._body = payload
        else:  # in one piece: many small objects would take many times their size
            self._body = self._body if isinstance(self._body, bytearray) else bytearray(self._body)
            self._body += payload
        self._connection.note_unread(len(payload))

    def _add_credit(self, size: int) -> None:
        self._credit += size
        if self._credit > MAX_CREDIT:
            raise FrameError(f"a credit of {self._credit} bytes for stream {self.number}")
        self._wake_sender()

    def leave(self) -> None:
        """Tell the application that the client has left."""
        self._has_left = True
        self._event.set()

    def end(self) -> None:
        """Drop what the application sends from now on; it is told that the client has left."""
        self._is_over = True
        self._drop_body()
        self._wake_sender()
        self.leave()

    def _drop_body(self) -> None:
        if self._body:
            self._connection.note_unread(-len(self._body))
            self._body = b""

    def _wake_sender(self) -> None:
        if self._credited is not None and not self._credited.done():
            self._credited.set_result(None)

    # --- the application

    async def run(self, app: ASGIApp) -> None:
        """Call the application. As in uvicorn, its errors are logged and end here."""
        if self._is_over:
            return
        logger = self._connection.http.logger
        try:
            result: Any = await app(self._scope, self.receive, self.send)  # type: ignore[func-returns-value]
        except BaseException as error:
            logger.error("Exception in ASGI application\n", exc_info=error)
            if isinstance(error, asyncio.CancelledError):
                self._connection.is_hurried = True
        else:
            if result is not None:
                logger.error("ASGI callable should return None, but returned '%s'.", result)
            elif not (self._is_complete or self._has_left):
                what = "completing" if self._has_begun else "starting"
                logger.error(f"ASGI callable returned without {what} response.")
        if not (self._has_begun or self._has_left):
            await Response("Internal Server Error", 500)(self._scope, self.receive, self.send)

    def on_done(self, task: asyncio.Task[None]) -> None:
        """End what the application has not: the task is over, or was cancelled before it began."""
        http = self._connection.http
        http.tasks.discard(task)
        self._connection.note_end(self.head_size)
        self.break_off()

    def break_off(self) -> None:
        """End the stream as broken, unless it is over."""
        if not (self._is_complete or self._is_over):
            self._connection.answer(reset(self.number, RESET_BROKEN))
            self._connection.forget(self.number)
            self.end()

    async def receive(self) -> Message:
        if not (self._has_left or self._is_complete):
            await self._event.wait()
            self._event.clear()
        if self._has_left or self._is_complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), b""
        self._note_read(len(body))
        return {"type": "http.request", "body": body, "more_body": self._more}

    def _note_read(self, size: int) -> None:
        self._connection.note_unread(-size)
        self._consumed += size
        if self._more and self._consumed and 2 * self._consumed >= WINDOW:
            self._output.put(credit(self.number, self._consumed))
            self._window += self._consumed
            self._consumed = 0

    async def send(self, message: Message) -> None:
        if self._output.is_full:
            await self._output.wait_for_room()
        if self._is_over:
            await asyncio.sleep(0)  # one that never waits could not be told
            return
        rest = self._send_now(message)
        if rest is not None:
            await self._send_slices(memoryview(rest), message.get("more_body", False))

    def _send_now(self, message: Message) -> bytes | None:
        """Send what can be sent at once; return a body that is large, or has to wait. Raises `RuntimeError`
        for what must not be sent now, and `ValueError` for a head that cannot be sent at all.
        """
        kind = message["type"]
        if kind != self._expected:
            raise RuntimeError(self._unexpected(kind))
        if kind == _START:
            self._send_head(message["status"], list(message.get("headers", ())))
            return None
        body: bytes = b"" if self._scope["method"] == "HEAD" else message.get("body", b"")
        more: bool = message.get("more_body", False)
        size = len(body)
        if self._left is not None:
            self._check_length(size, more)
        if size > self._credit or size > MAX_PAYLOAD:
            return body
        self._put(body, more)
        return None

    def _unexpected(self, kind: str) -> str:
        if self._is_complete:
            return f"Unexpected ASGI message '{kind}' sent, after response already completed."
        return f"Expected ASGI message '{self._expected}', but got '{kind}'."

    def _send_head(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        payload = self._connection.head(status, fields)
        if self._scope["method"] != "HEAD":
            self._left = _content_length(status, fields)
        self._expected = _BODY
        self._connection.log_access(self._scope, status)
        self._output.put(frame(HEAD, self.number, payload))

    def _check_length(self, size: int, more: bool) -> None:
        """Hold a body against the length that was announced. Raises `RuntimeError`, as uvicorn does."""
        self._left = (self._left or 0) - size
        if self._left < 0:
            raise RuntimeError("Response content longer than Content-Length")
        if self._left and not more:
            raise RuntimeError("Response content shorter than Content-Length")

    def _put(self, body: bytes | memoryview, more: bool) -> None:
        if body or not more:
            self._credit -= len(body)
            self._output.put_data(DATA if more else DATA | END, self.number, body)
        if not more:
            self._complete()

    async def _send_slices(self, body: memoryview, more: bool) -> None:
        """Send a body that is large, or that has to wait: in frames, as credit and the transport allow."""
        start, size = 0, len(body)
        while True:
            await self._wait_for_room(needs_credit=start < size)
            if self._is_over:
                return
            end = min(size, start + MAX_PAYLOAD, start + self._credit)
            self._put(body[start:end], more or end < size)
            start = end
            if start == size:
                return
            await asyncio.sleep(0)  # a turn for others: the transport may take it all at once

    async def _wait_for_room(self, *, needs_credit: bool) -> None:
        while needs_credit and not self._credit and not self._is_over:
            self._credited = asyncio.get_running_loop().create_future()
            await self._credited
        await self._output.wait_for_room()

    def _complete(self) -> None:
        self._is_complete = True
        self._expected = ""
        self._connection.http.server_state.total_requests += 1
        self._drop_body()
        self._event.set()
        self._connection.forget(self.number)


def _content_length(status: int, fields: Fields) -> int | None:
    """Return how long a body must be, None if its head does not say."""
    given = [value for name, value in fields if name.lower() == b"content-length"]
    if given:
        return int(given[0])
    return 0 if status in (204, 304) else None
