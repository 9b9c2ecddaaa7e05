"""Browsers ask whether a page of another site may read an answer, or send what a form cannot (CORS).

They ask by headers of the request, or by an OPTIONS request ahead of it (preflight). The answers are those
of starlette's middleware, which vLLM's server has. Here they are given at the connection, so that they also
go out with errors of the server itself, and before API keys are looked at, which preflights do not have.
"""

from __future__ import annotations

import re
from typing import Final

from orchestrator.config.options import CorsConfig
from orchestrator.errors import Overloaded
from orchestrator.http.exchange import Headers
from orchestrator.http.http_exchange import HttpExchange
from orchestrator.wire.headers import header_block

METHODS: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# What a page may send without being allowed to (Fetch, CORS-safelisted request headers).
HARMLESS: Final = ("accept", "accept-language", "content-language", "content-type")
# What a page may read beside content type and length: our own headers, and what says when to ask again.
EXPOSED: Final = (
    "x-request-id",
    "x-process-time",
    "x-baton-path",
    "x-baton-kv",
    "x-baton-embeddings",
    "x-should-retry",
    "server-timing",
    "retry-after",
    "www-authenticate",
    "endpoint-load-metrics",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
)
_is_list_of_names: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, \t-]*").fullmatch
_VARY: Final = b"vary: Origin\r\n"
_VARY_PREFLIGHT: Final = (
    b"vary",
    b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
)


class Cors:
    """This says what pages of other sites may do, by the config's section."""

    def __init__(self, options: CorsConfig) -> None:
        self._takes_all = "*" in options.allowed_origins
        self._origins = frozenset(origin.encode() for origin in options.allowed_origins)
        self._methods = frozenset(METHODS if "*" in options.allowed_methods else options.allowed_methods)
        self._takes_all_headers = "*" in options.allowed_headers
        self._names = frozenset({*HARMLESS, *(name.lower() for name in options.allowed_headers)})
        self._credentials = [(b"access-control-allow-credentials", b"true")] * options.allow_credentials
        self._max_age = b"%d" % options.max_age_s
        exposed = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
        self._of_every_answer = header_block([*self._credentials, exposed])

    def answers(self, exchange: HttpExchange) -> bool:
        """Add to the answer what lets the page read it. Return True if the request was a preflight: it is
        answered.
        """
        origin = exchange.header(b"origin")
        exchange.added = self._headers(origin)
        wanted = exchange.header(b"access-control-request-method")
        if origin is None or wanted is None or exchange.method != "OPTIONS":
            return False
        if exchange.refusal is not None and not isinstance(exchange.refusal, Overloaded):
            return False
        exchange.added = b""
        exchange.body.discard()
        exchange.respond(*self._preflight(exchange, origin, wanted))
        return True

    def _headers(self, origin: bytes | None) -> bytes:
        """Return what an answer says to a page of `origin`; None if no page asks."""
        if origin is None or not self._takes(origin):
            return b"" if self._takes_all else _VARY
        return self._allowed(origin) + self._of_every_answer

    def _takes(self, origin: bytes) -> bool:
        return self._takes_all or origin.lower() in self._origins

    def _allowed(self, origin: bytes) -> bytes:
        if self._takes_all:
            return b"access-control-allow-origin: *\r\n"
        return b"access-control-allow-origin: %b\r\n%b" % (origin, _VARY)

    # --- preflights

    def _preflight(self, exchange: HttpExchange, origin: bytes, wanted: bytes) -> tuple[int, Headers, bytes]:
        names = exchange.header(b"access-control-request-headers") or b""
        failures = []
        if not self._takes(origin):
            failures.append("origin")
        if wanted.decode("latin-1") not in self._methods:
            failures.append("method")
        if not self._takes_names(names):
            failures.append("headers")
        if failures:
            text = f"Disallowed CORS {', '.join(failures)}"
            return 400, [(b"content-type", b"text/plain; charset=utf-8"), _VARY_PREFLIGHT], text.encode()
        return 200, self._permission(origin, names), b"OK"

    def _takes_names(self, names: bytes) -> bool:
        """Return whether a page may send these headers, which a browser lists in one line."""
        if not _is_list_of_names(names):
            return False
        wanted = (name.strip().lower().decode("ascii") for name in names.split(b","))
        return self._takes_all_headers or all(name in self._names for name in wanted if name)

    def _permission(self, origin: bytes, names: bytes) -> list[tuple[bytes, bytes]]:
        allowed = names if self._takes_all_headers and names else ", ".join(sorted(self._names)).encode()
        return [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"access-control-allow-origin", b"*" if self._takes_all else origin),
            (b"access-control-allow-methods", ", ".join(sorted(self._methods)).encode()),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", self._max_age),
            *self._credentials,
            _VARY_PREFLIGHT,
        ]
