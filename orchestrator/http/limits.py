"""An HTTP server has these limits."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from orchestrator.config.descriptors import most_clients
from orchestrator.config.options import OrchestratorConfig
from orchestrator.http.hosts import Hosts

PROBES: Final = frozenset({"/health", "/ping", "/ready"})


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """A server has these limits. Seconds are met with a resolution of `sweep_s`."""

    header_timeout_s: float = 10.0  # from the first byte to the end of the head; also for a silent new client
    body_idle_timeout_s: float = 10.0  # between two pieces of a body
    body_timeout_s: float = 60.0  # for the body as a whole
    write_timeout_s: float = (
        60.0  # a client that takes less than MIN_TAKEN of what waits in so long is cut off
    )
    max_request_line: int = 16 * 1024  # bytes; more is 414
    max_header_bytes: int = 32 * 1024  # all header fields as sent; more is 431
    max_headers: int = 100  # fields; more is 431
    max_body_bytes: int = 16 * 1024 * 1024  # more is 413
    max_upload_bytes: int = 64 * 1024 * 1024  # the same for `uploads`
    uploads: frozenset[str] = frozenset()  # paths whose bodies are sent on as they come
    drain_bytes: int = (
        1024 * 1024
    )  # what is left of a refused body is read up to here, else the connection closes
    max_connections: int = sys.maxsize  # open at the same time; see `crowd.py`
    limit_concurrency: int | None = None  # requests in progress; more are 503
    probes: frozenset[str] = PROBES  # paths, answered above max_connections and limit_concurrency, too
    hosts: Hosts | None = None  # requests for others are 421; None: for all
    sweep_s: float = 0.25

    def most_of(self, path: str) -> int:
        """Return how many bytes a body for this path may have."""
        most = self.max_body_bytes
        return max(self.max_upload_bytes, most) if path in self.uploads else most

    @classmethod
    def of(
        cls, config: OrchestratorConfig, listen: str | None = None, uploads: Iterable[str] = ()
    ) -> ServerLimits:
        """Return those of the listener at `listen`, else of the data plane's, which has `uploads`."""
        limits = config.limits
        return cls(
            header_timeout_s=limits.header_timeout_s,
            body_idle_timeout_s=limits.body_idle_timeout_s,
            body_timeout_s=limits.body_timeout_s,
            write_timeout_s=limits.client_write_timeout_s,
            max_body_bytes=limits.max_body_bytes,
            max_upload_bytes=limits.max_upload_bytes,
            uploads=frozenset(uploads),
            max_connections=config.max_connections or most_clients(),
            limit_concurrency=config.limit_concurrency,
            hosts=Hosts.of(config.allowed_hosts, listen or config.listen),
        )
