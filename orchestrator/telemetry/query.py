"""Who looks a request up says which with a query, which other processes are told as well."""

from __future__ import annotations

import msgspec


class RequestQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """This says which requests are looked for."""

    name: str | None = None  # a request id, or the id of an answer: then all else is None
    key: str | None = None  # the name of the client's key
    model: str | None = None
    worker: str | None = None  # that served it, or has failed it
    failed: bool = False  # only those that ended with an error, or that a worker has failed
    slowest: bool = False  # the slowest first, in place of the newest
    slower_s: float = 0.0
    limit: int = 50
