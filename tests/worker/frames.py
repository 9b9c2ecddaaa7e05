"""The orchestrator's end of a connection that carries many requests, and servers to connect to."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from starlette.types import ASGIApp

from orchestrator.wire.headers import fields_of, header_block
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    LAST,
    MAX_PAYLOAD,
    OPEN,
    RESET,
    U16,
    U32,
    UPGRADE_PATH,
    VERSION,
    FrameReader,
    credit,
    frame,
)
from tests.waiting import LIMIT_S, wait_for
from worker.sim.server import listen


class Frame(NamedTuple):
    kind: int
    is_last: bool
    stream: int
    payload: bytes


class Answer:
    """What came of one stream. `status` is 0 without a head."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_whole = False
        self.reset: int | None = None

    @property
    def is_over(self) -> bool:
        return self.is_whole or self.reset is not None

    def add(self, got: Frame) -> None:
        if got.kind == HEAD:
            self.status = U16.unpack(got.payload[:2])[0]
            fields = fields_of(got.payload[2:])
            self.headers = {name.decode(): value.decode("latin-1") for name, value in fields}
        elif got.kind == DATA:
            self.body += got.payload
        elif got.kind == RESET:
            self.reset = got.payload[0]
        self.is_whole = self.is_whole or (got.kind in (HEAD, DATA) and got.is_last)


class Refused(Exception):
    """The upgrade was answered otherwise than 101."""

    def __init__(self, head: bytes) -> None:
        super().__init__(head)
        self.status = int(head.split()[1])
        self.head = head.lower()


class Mux:
    """One connection, after the upgrade. `gives_credit`: for what is read of an answer."""

    def __init__(
        self,
        address: tuple[str, int],
        headers: dict[str, str] | None = None,
        *,
        version: bytes = VERSION,
        receive_buffer: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Raises `Refused`."""
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(LIMIT_S)
        self.gives_credit = True
        self.answers: dict[int, Answer] = {}
        self.frames: list[Frame] = []  # that were read, in their order
        self.credits: dict[int, int] = {}  # bytes that were allowed
        self.is_closing = False  # the worker has said so
        self._highest = 0
        self._reader = FrameReader(self._on_frame)
        try:
            self.socket.connect(address)
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname=address[0])
            self._reader.feed(self._upgrade(headers or {}, version))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Mux:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def _upgrade(self, headers: dict[str, str], version: bytes) -> bytes:
        fields = [(b"host", b"worker"), (b"connection", b"Upgrade"), (b"upgrade", version)]
        fields += [(name.encode(), value.encode()) for name, value in headers.items()]
        self.socket.sendall(b"GET %b HTTP/1.1\r\n%b\r\n" % (UPGRADE_PATH.encode(), header_block(fields)))
        read = b""
        while b"\r\n\r\n" not in read:
            chunk = self.socket.recv(65536)
            assert chunk, read
            read += chunk
        head, _, rest = read.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise Refused(head)
        return rest

    def _on_frame(self, kind: int, is_last: bool, stream: int, payload: bytes) -> None:
        got = Frame(kind, is_last, stream, payload)
        self.frames.append(got)
        if kind == LAST:
            self.is_closing = True
        elif kind == CREDIT:
            self.credits[stream] = self.credits.get(stream, 0) + U32.unpack(payload)[0]
        elif stream:
            answer = self.answers[stream]
            assert not answer.is_over, got
            answer.add(got)
            if kind == DATA and self.gives_credit and payload and not is_last:
                self.send(credit(stream, len(payload)))

    # --- what is sent

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self, method: str, target: str, headers: dict[str, str]) -> bytes:
        fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        return f"{method} {target}\r\n".encode() + header_block(fields)

    def opening(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """The number of a new stream, and the frames that open it with its whole body."""
        self._highest += 1
        number = self._highest
        self.answers[number] = Answer()
        head = self.head(method, target, headers or {})
        opened = frame(OPEN if body is not None else OPEN | END, number, head)
        return number, opened if body is None else opened + frame(BODY | END, number, body)

    def open(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> int:
        number, frames = self.opening(method, target, body, headers)
        self.send(frames)
        return number

    def open_without_end(self, method: str, target: str, headers: dict[str, str] | None = None) -> int:
        """Open a stream whose body is sent by `body`."""
        number, frames = self.opening(method, target, b"", headers)
        self.send(frames[: -len(frame(BODY | END, number))])
        return number

    def body(self, number: int, data: bytes, *, is_last: bool = False) -> None:
        """Send a piece of a body, whatever the credit."""
        starts = range(0, len(data) or 1, MAX_PAYLOAD)
        for start in starts:
            kind = BODY | END if is_last and start == starts[-1] else BODY
            self.send(frame(kind, number, data[start : start + MAX_PAYLOAD]))

    # --- what is read

    def read(self) -> bool:
        """Read once; False at the end of the connection. Raises `ConnectionResetError` for RST."""
        data = self.socket.recv(256 * 1024)
        self._reader.feed(data)
        return bool(data)

    def answer(self, number: int) -> Answer:
        """The answer of a stream, when it is over."""
        while not self.answers[number].is_over:
            assert self.read(), f"the connection ended before stream {number}"
        return self.answers[number]

    def ask(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        return self.answer(self.open(method, target, body, headers))

    def read_to_end(self) -> bool:
        """Read until the connection ends; whether it ended by RST."""
        try:
            while self.read():
                pass
        except ConnectionResetError:
            return True
        return False


class Server:
    """A server in a thread of the test."""

    def __init__(self, server: uvicorn.Server, address: tuple[str, int]) -> None:
        self.uvicorn = server
        self.address = address
        self.url = f"http://{address[0]}:{address[1]}"

    def connect(self, headers: dict[str, str] | None = None, **options: Any) -> Mux:
        return Mux(self.address, headers, **options)

    @property
    def tasks(self) -> int:
        return len(self.uvicorn.server_state.tasks)

    @property
    def connections(self) -> int:
        return len(self.uvicorn.server_state.connections)

    def connection(self) -> Any:
        """The protocol of the only connection."""
        (connection,) = self.uvicorn.server_state.connections
        return connection

    def stop(self) -> None:
        self.uvicorn.should_exit = True


@contextmanager
def serving(app: ASGIApp, **options: Any) -> Iterator[Server]:
    """Serve `app` until the block ends, with these options of `uvicorn.Config`."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, **({"log_config": None, "timeout_graceful_shutdown": 3} | options))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_for(lambda: server.started, "the server")
        yield Server(server, listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        assert not thread.is_alive()
