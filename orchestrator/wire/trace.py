"""Trace headers of a client go on to workers if they are what W3C Trace Context says; where requests are
traced, workers get those of our own span, which continues the client's trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"

# Version 00 ends behind its flags, a later one may go on; ff, and ids of zeros alone, are none.
_match: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]*)?"
).fullmatch
_MAX_BYTES: Final = 256
_SAMPLED: Final = 1  # the lowest of the flags


class TraceContext:
    """This is our span of a request: where it stands in which trace."""

    __slots__ = ("is_sampled", "parent", "span", "state", "trace")

    def __init__(self, trace: int, span: int, parent: int, is_sampled: bool, state: bytes) -> None:
        """`trace` has 128 bits, `span` and `parent` have 64; `parent`, of the client, is 0 if there is none
        and `state` is what its `tracestate` holds.
        """
        self.trace = trace
        self.span = span
        self.parent = parent
        self.is_sampled = is_sampled
        self.state = state

    def fields(self) -> list[tuple[bytes, bytes]]:
        """Return the header fields that make this span the parent of what a worker does."""
        parent = b"00-%032x-%016x-%02x" % (self.trace, self.span, self.is_sampled)
        if self.state:
            return [(TRACEPARENT, parent), (TRACESTATE, self.state)]
        return [(TRACEPARENT, parent)]


def without_trace(fields: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the fields that are not of a trace."""
    return [field for field in fields if field[0] not in (TRACEPARENT, TRACESTATE)]


def without_broken_trace(fields: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the fields, without those of a trace unless it has one `traceparent`, and a right one."""
    return without_trace(fields) if _parent_in(fields) is None else list(fields)


def continued(
    fields: Sequence[tuple[bytes, bytes]], bits: Callable[[int], int], share: Callable[[], bool]
) -> TraceContext:
    """Return a new span of the trace that the fields name, or of a new one, if they name none that is right.

    `bits` returns a random number of so many bits. Whoever began the trace has decided whether it is sampled;
    of a new one `share` decides.
    """
    parent = _parent_in(fields)
    span = bits(64) or 1  # 0 stands for none
    if parent is None:
        return TraceContext(bits(128) or 1, span, 0, share(), b"")
    state = b",".join([value for name, value in fields if name == TRACESTATE])
    is_sampled = bool(int(parent[53:55], 16) & _SAMPLED)
    return TraceContext(int(parent[3:35], 16), span, int(parent[36:52], 16), is_sampled, state)


def _parent_in(fields: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    parents = [value.strip() for name, value in fields if name == TRACEPARENT]
    return parents[0] if len(parents) == 1 and _is_right(parents[0]) else None


def _is_right(parent: bytes) -> bool:
    is_known = parent.startswith(b"00-")
    return len(parent) <= _MAX_BYTES and _match(parent) is not None and (not is_known or len(parent) == 55)
