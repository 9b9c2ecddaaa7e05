"""The only place here that knows how both ends are made, and where they keep what is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from orchestrator.compiled import is_compiled
from orchestrator.transport import mux
from orchestrator.transport.base import Origin
from orchestrator.transport.mux import MuxUpstream
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire import streams as wire
from tests.simulation.streams.schedule import Schedule
from worker import streams
from worker.streams import Connection, Streams

# What uvicorn says of applications that fail, and of upgrades that it does not know.
EXPECTED_LINES = (
    "ASGI callable returned without",
    "Unsupported upgrade request",
    "No supported WebSocket",
)
REFUSED_LINE = "its legs go by HTTP"  # as the worker has given another answer, or none


@contextlib.contextmanager
def limits(schedule: Schedule) -> Iterator[None]:
    """Have both ends work with a schedule's limits; the compiled form has its own ones built in."""
    if is_compiled():
        yield
        return
    window = {"WINDOW": schedule.window}
    payload = {"MAX_PAYLOAD": schedule.max_payload}
    count = {"MAX_STREAMS": schedule.max_streams}
    known = count if schedule.is_max_known else {}
    mux_only = {
        "_GIVE_AT": schedule.window // 2,
        "_JOIN_LIMIT": min(mux._JOIN_LIMIT, schedule.max_payload),
    }
    with (
        patch.multiple(mux, **mux_only, **window, **payload, **known),
        patch.multiple(streams, **window, **payload, **count),
        patch.multiple(wire, **payload),
    ):
        yield


def wrap(application: Any) -> Any:
    """Return an application with the worker's end around it."""
    return Streams(application)


def upstream(connect: Callable[..., Any]) -> MuxUpstream:
    return MuxUpstream(PooledUpstream(connect=connect))


def offer(upstream: MuxUpstream, origin: Origin) -> None:
    upstream.offer(origin, True)


def streams_at_orchestrator(upstream: MuxUpstream) -> int:
    return sum(len(connection._streams) for connection in upstream._connections)


def connections_of_orchestrator(upstream: MuxUpstream) -> int:
    return len(upstream._connections)


def streams_at_worker(protocol: object) -> int:
    return len(protocol._streams) + protocol._tasks if isinstance(protocol, Connection) else 0
