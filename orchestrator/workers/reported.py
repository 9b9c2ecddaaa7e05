"""A worker reports what it has to do by the legs of all orchestrators, and whether it wants more."""

from __future__ import annotations

from orchestrator.wire.load import LoadReport


class Reported:
    """A worker has said this of itself, since it came into service."""

    __slots__ = ("drains_itself", "is_heard", "last", "senders")

    def __init__(self) -> None:
        self.drains_itself = False  # it wants no new legs until it says otherwise
        self.senders = 1  # orchestrators that ask it, this one among them
        self.is_heard = False  # the legs of others count: `routing.load`
        self.last: LoadReport | None = None  # of a probe; only the process that probes has it
