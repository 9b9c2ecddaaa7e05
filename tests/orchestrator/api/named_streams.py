"""Streams with named events, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from orchestrator.wire.sse import Events


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def pieces(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """The stream, cut at these places."""
    ends = sorted({place % (len(stream) + 1) for place in places})
    return [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]


def relayed(events: Events, chunks: Sequence[bytes]) -> bytes:
    """What the client gets of a stream that ends with its last chunk."""
    sent = b"".join(events.feed(chunk) for chunk in chunks if chunk)
    events.finish()
    return sent
