"""Who has to wait for a seat says what it asks for, and hears when the wait is over."""

from __future__ import annotations

from typing import Protocol

from orchestrator.errors import BatonError
from orchestrator.relay.tenants import Tenant
from orchestrator.relay.turns import Turn


class Demand:
    """A request that has to wait asks for this."""

    __slots__ = ("deadline", "is_stream", "priority", "size", "tenant", "tokens", "work")

    def __init__(
        self,
        tokens: int,
        size: int,
        deadline: float,
        is_stream: bool,
        work: float = 0.0,
        priority: int = 0,
        tenant: Tenant | None = None,
    ) -> None:
        """`size` is in bytes, `deadline` a moment of the event loop's clock. `work` is in seconds, and need
        be right only beside that of others; the lower `priority` goes first. These two are for a gate that
        `weighs`. `tenant` has the API key, if there are keys.
        """
        self.tokens = tokens
        self.size = size
        self.deadline = deadline
        self.is_stream = is_stream
        self.work = work
        self.priority = priority
        self.tenant = tenant


class SeatPromise(Protocol):
    """It tells that a wait is over: a future, or what stands for one where no event loop runs. Its result is
    None once the seat is taken, and else why there is none.
    """

    def done(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def result(self) -> BatonError | None: ...

    def set_result(self, result: BatonError | None, /) -> None: ...


class Charge:
    """What a tenant was charged for a seat: so many seconds of it, for so much work."""

    __slots__ = ("seconds", "tenant", "work")

    def __init__(self, tenant: Tenant | None, work: float, seconds: float) -> None:
        self.tenant = tenant
        self.work = work
        self.seconds = seconds


class Waiter(Turn):
    """Somebody waits at a gate."""

    __slots__ = ("charge", "demand", "seat", "since")

    def __init__(self, demand: Demand, since: float, at: float, seat: SeatPromise) -> None:
        """`at` is its turn. `seat` brings None when the seat is taken for it."""
        super().__init__(at)
        self.demand = demand
        self.since = since
        self.seat = seat
        self.charge: Charge | None = None  # for the seat, once it is taken
