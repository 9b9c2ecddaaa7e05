"""The only place here that knows how both ends are made, and where they keep what is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.transport.base import Origin, Upstream
from orchestrator.transport.pool import PooledUpstream

EXPECTED_LINES = ("ASGI callable returned without", "Unsupported upgrade request", "No supported WebSocket")


def is_compiled() -> bool:
    return False


@contextlib.contextmanager
def limits(window: int, max_payload: int, max_streams: int) -> Iterator[None]:
    yield


def wrap(application: Any) -> Any:
    return application


def upstream(connect: Callable[..., Any]) -> Upstream:
    return PooledUpstream(connect=connect)


def offer(upstream: Upstream, origin: Origin) -> None: ...


def streams_at_orchestrator(upstream: Upstream) -> int:
    return 0


def streams_at_worker(protocol: Any) -> int:
    return 0
