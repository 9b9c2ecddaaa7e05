"""Many requests travel at once over one connection to a worker, in frames; this is their format, version 1.

The orchestrator opens the connection with an HTTP upgrade:

    GET /v1/baton/streams, Connection: Upgrade, Upgrade: baton-streams/1  ->  101 with the same `Upgrade`

A worker that does not speak this version answers 426 with the version that it speaks, and stays an HTTP
worker; so does any other answer than 101. After the 101 both sides send frames. Integers are big-endian:

    u32 size of the payload | u8 kind, with `END` | u32 stream | payload of at most `MAX_PAYLOAD` bytes

The orchestrator numbers its streams upwards from 1 and never uses a number again. Stream 0 is the
connection's.

| kind | sent by | payload |
|---|---|---|
| OPEN | orchestrator | `METHOD target` and a line end, then a `header_block()`; END: no body follows |
| BODY | orchestrator | a piece of the request's body; END: the last one, which may be empty |
| HEAD | worker | u16 status, from 200 on; a `header_block()` with lower-case names; END: no body follows |
| DATA | worker | a piece of the answer's body; END: the last one, which may be empty |
| RESET | both | u8 `RESET_*`: the stream is over at once; whoever gets it sends nothing more of it |
| LEAVE | orchestrator | nothing: the client has left; an answer that is on its way is still wanted |
| CREDIT | both | u32: so many more bytes of BODY or DATA may be sent on this stream |
| PING | both | 8 bytes; with END it is the answer to one, and has its bytes |
| LAST | worker | nothing, stream 0: streams opened from now on are refused; those under way go on |

A stream may have `WINDOW` bytes of BODY, and as many of DATA, under way without credit; payloads of other
kinds do not count. A frame of a stream that is over is dropped: it has crossed the end. Frames that a side
cannot have sent by these rules end the connection, and with it all of its streams: an unknown kind, a payload
that is too large or has not the size of its kind, BODY or DATA beyond the credit, a stream that was never
opened, credit beyond `MAX_CREDIT`, two heads, data before the head, a head that is none or has more fields
than `MAX_FIELDS`, an answer to no ping. The streams of which no such frame speaks have done nothing wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

UPGRADE_PATH: Final = "/v1/baton/streams"  # under /v1, where workers ask for their key
VERSION: Final = b"baton-streams/1"

OPEN: Final = 1
BODY: Final = 2
HEAD: Final = 3
DATA: Final = 4
RESET: Final = 5
LEAVE: Final = 6
CREDIT: Final = 7
PING: Final = 8
LAST: Final = 9
END: Final = 0x80  # a flag beside the kind

RESET_CANCELLED: Final = 0  # by the orchestrator: the answer is not wanted
RESET_REFUSED: Final = 1  # by the worker: its application has seen nothing of it; send it elsewhere
RESET_BROKEN: Final = 2  # by the worker: the application ended before its answer did

MAX_PAYLOAD: Final = 64 * 1024
WINDOW: Final = 256 * 1024
MAX_CREDIT: Final = 2**31 - 1  # that a stream may have at one time
MAX_FIELDS: Final = 1024  # of an answer's head: each takes more memory than its bytes
MAX_STREAMS: Final = 4096  # under way on one connection; more are refused by `RESET_REFUSED`

HEADER: Final = Struct("!IBI")
HEADER_SIZE: Final = 9
U16: Final = Struct("!H")
U32: Final = Struct("!I")

_PING_SIZE: Final = 8
_LAST_KIND: Final = LAST

# The size that the payload of a kind has; -1: any.
_SIZES: Final = (-1, -1, -1, -1, -1, 1, 0, 4, _PING_SIZE, 0)

OnFrame = Callable[[int, bool, int, bytes], None]


class FrameError(Exception):
    """The other side has broken the format; the message says how. The connection cannot be used any more."""


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame; `kind` may have `END`. The payload must not be larger than `MAX_PAYLOAD`."""
    return HEADER.pack(len(payload), kind, stream) + payload


def credit(stream: int, size: int) -> bytes:
    """Return the frame that allows `size` more bytes."""
    return frame(CREDIT, stream, U32.pack(size))


def reset(stream: int, code: int) -> bytes:
    """Return the frame that ends a stream."""
    return frame(RESET, stream, bytes((code,)))


class FrameReader:
    """It cuts what a connection reads into frames, and holds at most one unfinished frame."""

    __slots__ = ("_on_frame", "_rest")

    def __init__(self, on_frame: OnFrame) -> None:
        """`on_frame` gets the kind, whether it has `END`, the stream and the payload of each frame."""
        self._on_frame = on_frame
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was read. Raises `FrameError`, and what `on_frame` raises; not to be used after that."""
        if self._rest:
            data = self._rest + data
        size = len(data)
        start = 0
        while size - start >= HEADER_SIZE:
            length, kind, stream = HEADER.unpack_from(data, start)
            body = start + HEADER_SIZE
            check_header(kind & ~END, length)
            if body + length > size:
                break
            start = body + length
            self._on_frame(kind & ~END, kind >= END, stream, data[body:start])
        self._rest = data[start:] if start < size else b""


def check_header(kind: int, length: int) -> None:
    """Check what can be told by a frame's header, before its payload is waited for. Raises `FrameError`."""
    if not OPEN <= kind <= _LAST_KIND:
        raise FrameError(f"a frame of unknown kind {kind}")
    wanted = _SIZES[kind]
    if length > MAX_PAYLOAD or (wanted >= 0 and length != wanted):
        raise FrameError(f"a frame of kind {kind} with {length} bytes")
