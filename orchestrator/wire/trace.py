"""Trace headers of a client go on to workers if they are what W3C Trace Context says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"

# Version 00 ends behind its flags, a later one may go on; ff, and ids of zeros alone, are none.
_match: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]*)?"
).fullmatch
_MAX_BYTES: Final = 256


def without_broken_trace(fields: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the fields, without those of a trace unless it has one `traceparent`, and a right one."""
    parents = [value for name, value in fields if name == TRACEPARENT]
    if len(parents) == 1 and _is_right(parents[0].strip()):
        return list(fields)
    return [field for field in fields if field[0] not in (TRACEPARENT, TRACESTATE)]


def _is_right(parent: bytes) -> bool:
    is_known = parent.startswith(b"00-")
    return len(parent) <= _MAX_BYTES and _match(parent) is not None and (not is_known or len(parent) == 55)
