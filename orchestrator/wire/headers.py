"""Header fields are bytes as on the wire: both HTTP sides are given them so, and hot heads are made once."""

from __future__ import annotations

from collections.abc import Iterable

Fields = Iterable[tuple[bytes, bytes]]


def header_block(fields: Fields) -> bytes:
    """Write `name: value` lines, each with its line end. Raises `ValueError` for a line break or NUL in a
    name or value.
    """
    lines = [b"%b: %b\r\n" % field for field in fields]
    block = b"".join(lines)
    if block.count(b"\n") != len(lines) or block.count(b"\r") != len(lines) or 0 in block:
        raise ValueError("a line break or NUL in a header")
    return block


def fields_of(block: bytes) -> list[tuple[bytes, bytes]]:
    """Return what a `header_block()` was made of."""
    parted = (line.partition(b": ") for line in block.split(b"\r\n")[:-1])
    return [(name, value) for name, _, value in parted]
