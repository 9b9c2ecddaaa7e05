"""Bodies that must be refused: damaged, not JSON's, or small on the wire and huge in memory."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5}
MILLION = 1_000_000


def field(value: bytes) -> bytes:
    """A document whose only field has this msgpack value."""
    return b"\x81\xa1a" + value


def array(count: int, entries: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + entries


def nested(levels: int, wrap: bytes, value: bytes = b"\xc0") -> bytes:
    """A document of so many levels; itself the first."""
    return field(wrap * (levels - 1) + value)


def fields(count: int) -> bytes:
    return b"".join(b"\xa6%06x\x91\x91\x90" % number for number in range(count))


BAD_BODIES: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: msgspec.msgpack.encode(CHAT)[:-1],
    "trailing bytes": lambda: msgspec.msgpack.encode(CHAT) + b"\xc0",
    "JSON": lambda: json.dumps(CHAT).encode(),
    "top level is an array": lambda: b"\x91\x01",
    "top level is nil": lambda: b"\xc0",
    "unused opcode": lambda: b"\xc1",
    "unused opcode in a field": lambda: field(b"\xc1"),
    "key is a number": lambda: b"\x81\x01\x01",
    "inner key is a number": lambda: field(b"\x81\x01\x01"),
    "deep key is a number": lambda: nested(20, b"\x91", b"\x81\x01\x01"),
    "key is nil": lambda: field(b"\x81\xc0\x01"),
    "key is bytes": lambda: field(b"\x81\xc4\x01a\x01"),
    "text is not UTF-8": lambda: field(b"\xa1\xff"),
    "key is not UTF-8": lambda: b"\x81\xa1\xff\x01",
    "deep text is not UTF-8": lambda: nested(20, b"\x91", b"\xa1\xff"),
    "surrogate": lambda: field(b"\xa3\xed\xa0\x80"),
    "bytes": lambda: field(b"\xc4\x01a"),
    "deep bytes": lambda: nested(20, b"\x91", b"\xc4\x01a"),
    "extension": lambda: field(b"\xd4\x01a"),
    "timestamp": lambda: field(b"\xd6\xff\x00\x00\x00\x01"),
    "NaN": lambda: msgspec.msgpack.encode({"a": float("nan")}),
    "infinity": lambda: msgspec.msgpack.encode({"a": [float("inf")]}),
    "deep infinity": lambda: nested(20, b"\x91", msgspec.msgpack.encode(float("-inf"))),
    "single NaN": lambda: field(b"\xca\x7f\xc0\x00\x00"),
    "deep single NaN": lambda: nested(20, b"\x91", b"\xca\xff\xc0\x00\x00"),
    "array of 4 G entries in 5 bytes": lambda: field(b"\xdd\xff\xff\xff\xff"),
    "map of 4 G entries in 5 bytes": lambda: field(b"\xdf\xff\xff\xff\xff"),
    "text of 4 GB in 5 bytes": lambda: field(b"\xdb\xff\xff\xff\xff"),
    "arrays too deep": lambda: nested(200, b"\x91"),
    "arrays far too deep": lambda: nested(100_000, b"\x91"),
    "maps far too deep": lambda: nested(100_000, b"\x81\xa0"),
    "bomb of empty maps": lambda: field(array(10 * MILLION, b"\x80" * 10 * MILLION)),
    "bomb of empty arrays": lambda: field(array(10 * MILLION, b"\x90" * 10 * MILLION)),
    "bomb of small maps": lambda: field(array(3 * MILLION, b"\x81\xa0\xc0" * 3 * MILLION)),
    "bomb one level down": lambda: field(b"\x91" + array(10 * MILLION, b"\x90" * 10 * MILLION)),
    "bomb of fields": lambda: b"\xdf" + MILLION.to_bytes(4, "big") + fields(MILLION),
    "bomb at the top level": lambda: array(10 * MILLION, b"\xc0" * 10 * MILLION),
}
