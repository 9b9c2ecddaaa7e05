"""The lease ledger knows who owes which prefill worker its KV blocks, until they are free again.

A prefill worker that has answered pins the prompt's blocks until somebody pulls them, or until the lease that
it gave ends. Every finished prefill is one `KvLease` here:

    HELD --use()--> USED --consume()--> CONSUMED      a decode worker pulled the blocks and answers
      |               |
      |               +-----(time)----> EXPIRED       its leg was lost, or had not begun when the lease ended
      +--release()--------------------> RELEASED      a release leg had them pulled
      +-------------------(time)------> EXPIRED       no release leg got through

A USED lease whose decode leg fails is not released: its blocks may be free already and hold another prompt,
and who pulled them again would fill a decode worker's prefix cache with wrong values. The exception is a
worker that refused the leg unread (`unuse`).

Nobody trusts what a decode worker answers from blocks that it may have pulled after the lease: `good_until`
is also the last moment for an answer to begin (`legs/handoff_watch.py`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from orchestrator.compiled import mypyc_attr
from orchestrator.config.options import LEASE_S
from orchestrator.legs.connectors.base import Handoff
from orchestrator.telemetry.counters import LeaseState, Telemetry
from orchestrator.workers.worker import Worker

# A hand-off is not sent in the last part of its lease, and no answer to it may begin then: the leg has to
# reach the worker, an answer has to come back, and the lease began before the prefill's answer reached us,
# which is what our clock starts with. It is this part of the lease, 2 s of vLLM's 30.
MARGIN: Final = 1 / 15

SWEEP_S: Final = 0.25  # how old the numbers of open leases may be


_HELD: Final = LeaseState.HELD
_USED: Final = LeaseState.USED
_CONSUMED: Final = LeaseState.CONSUMED
_RELEASED: Final = LeaseState.RELEASED
_EXPIRED: Final = LeaseState.EXPIRED


class KvLease:
    """A lease is one finished prefill: its hand-off, and what has become of it."""

    __slots__ = (
        "epoch",
        "expires",
        "good_until",
        "handoff",
        "is_asked_for",
        "is_handed_back",
        "ledger",
        "opened",
        "state",
        "worker",
    )

    def __init__(
        self, ledger: LeaseLedger, worker: Worker, handoff: Handoff, opened: float, lease_s: float
    ) -> None:
        """`worker` pins the blocks. `opened` is a moment of our clock, the arrival of the answer; until
        `good_until` the hand-off may be sent, and an answer to it may begin.
        """
        self.ledger = ledger
        self.worker = worker
        self.epoch = worker.epoch  # after a restart the blocks are gone
        self.handoff = handoff
        self.opened = opened
        self.expires = expires = opened + lease_s
        self.good_until = expires - lease_s * MARGIN
        self.state: LeaseState = _HELD
        self.is_handed_back = False  # a release leg looks after it, or it was too late for one
        self.is_asked_for = False  # whether its decode leg has begun

    def is_good(self, now: float) -> bool:
        """Tell whether the hand-off may be sent: it was never used, is not near its end, and its worker is
        the same one.
        """
        return self.state is _HELD and now < self.good_until and self.epoch == self.worker.epoch

    def use(self) -> None:
        """Note that a decode leg with the hand-off was written."""
        self.state = _USED

    def unuse(self) -> None:
        """Note that the decode worker never looked at the hand-off: the blocks are owed again."""
        if self.state is _USED:
            self.state = _HELD

    def consume(self) -> None:
        """Note that the decode worker answers, so that it has the blocks. It may be called again."""
        if self.state is _USED:
            self.ledger.end(self, _CONSUMED)

    def expire(self) -> None:
        """Note that nobody can say that its decode leg was in time."""
        if self.state is _USED:
            self.ledger.end(self, _EXPIRED)

    def release(self) -> None:
        """Note that a release leg was answered, or that a refusal has freed the blocks."""
        if self.state is _HELD:
            self.ledger.end(self, _RELEASED)


@mypyc_attr(allow_interpreted_subclasses=True)
class Watch(ABC):
    """Who looks after hand-offs that are under way (`legs/handoff_watch.py`) is called by their legs."""

    @abstractmethod
    def look(self, leg: Any, lease: KvLease, now: float) -> None:
        """Look at an `AnswerLeg` whose answer has not begun, and end it if it must not or should not begin
        any more.
        """
        ...


class LeaseLedger:
    """The ledger has all leases of a process. Ends are counted in its telemetry row, those open at every
    sweep.
    """

    def __init__(self, telemetry: Telemetry, time: Callable[[], float], lease_s: float = LEASE_S) -> None:
        """`lease_s` is how long prefill workers that do not announce it pin blocks that nobody pulls."""
        self._telemetry = telemetry
        self._row = telemetry.cells
        self._cell = telemetry.layout.leases
        self._leaked = telemetry.layout.leases_leaked
        self._time = time
        self._lease_s = lease_s
        self.open: set[KvLease] = set()  # HELD or USED
        self.watch: Watch  # given by who makes both

    def lease(self, worker: Worker, handoff: Handoff) -> KvLease:
        """Open a lease for a prefill that has just been answered."""
        lease = KvLease(self, worker, handoff, self._time(), worker.handoffs.lease_s or self._lease_s)
        self.open.add(lease)
        return lease

    def is_good(self, lease: KvLease) -> bool:
        """Tell whether the hand-off may still be sent."""
        return lease.is_good(self._time())

    def end(self, lease: KvLease, state: LeaseState) -> None:
        lease.state = state
        self.open.discard(lease)
        self._row[self._cell + state] += 1
        if state is _EXPIRED:
            name = lease.worker.name
            self._telemetry.tell("lease.expired", f"KV blocks stayed on {name} until their lease ended", name)

    async def sweep_forever(self) -> None:
        """Keep the books until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Close the leases that have lapsed, for their workers have freed the blocks; count the others."""
        now = self._time()
        for lease in [lease for lease in self.open if lease.expires <= now]:
            if lease.state is _HELD and not lease.is_handed_back:
                self._row[self._leaked] += 1  # no request holds one for so long: somebody forgot it
            self.end(lease, _EXPIRED)
        used = sum(lease.state is _USED for lease in self.open)
        self._row[self._cell + _USED] = used
        self._row[self._cell + _HELD] = len(self.open) - used
