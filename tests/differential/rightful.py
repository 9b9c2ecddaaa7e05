"""Where an answer of Baton's may differ from that of a worker, and why. Everything else is a fault."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Rightful:
    """A difference that is meant. `covers` are patterns of facts (`answers.py`) that it explains."""

    reason: str
    covers: tuple[str, ...]

    def explains(self, fact: str) -> bool:
        return any(fnmatchcase(fact, pattern) for pattern in self.covers)


# In every answer.
EVERYWHERE: dict[str, Rightful] = {
    "own headers": Rightful(
        "say which workers served a request, and whether its KV cache was transferred", ("header x-baton-*",)
    ),
    "request id": Rightful(
        "each request has an id, which the access log has as well", ("header x-request-id",)
    ),
    "times": Rightful(
        "where the time went, for whoever asks", ("header server-timing", "header x-process-time")
    ),
    "unbuffered": Rightful(
        "proxies before Baton are told not to hold a stream back",
        ("header cache-control", "header x-accel-buffering"),
    ),
    "server": Rightful("Baton's server is its own, and does not say what it is", ("header server",)),
    "date": Rightful("the answers are not made in the same second", ("header date",)),
    "length": Rightful("the length of what is compared anyway", ("header content-length",)),
}

# In the cases that name them.
NAMED: dict[str, Rightful] = {
    "own words": Rightful(
        "Baton refuses at once what it reads itself, in words and codes of its own; the status is a worker's",
        ("$.error.*",),
    ),
}
