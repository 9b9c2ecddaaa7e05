"""A prefill worker keeps blocks for decode workers, each under a lease, which has its end here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

from worker.sim.ledger import Ledger, Pin
from worker.sim.metrics import Metrics
from worker.sim.settings import Settings


def _overwritten(pin: Pin) -> Pin:
    """Return what is to be had of blocks that others use now: another prompt, of which nobody is told."""
    return replace(pin, block_ids=[], digest=sha256(pin.digest).digest())


class Leases:
    """It pins blocks, and frees them when they were taken or given up, or when their lease is over."""

    def __init__(
        self, ledger: Ledger, metrics: Metrics, settings: Settings, free: Callable[[list[int]], None]
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._lease_s = settings.lease_s
        self._late_pulls = settings.late_pulls
        self._expired: dict[str, Pin] = {}
        self._free = free
        self._expiry: asyncio.TimerHandle | None = None

    def next_end(self) -> float:
        """Return when a lease that begins now is over, in the event loop's time."""
        return asyncio.get_running_loop().time() + self._lease_s

    def pin(self, pin: Pin, *, is_lost: bool = False) -> None:
        """Pin blocks; a lost pin can be given up, but not pulled."""
        self._ledger.pin(pin, is_lost=is_lost)
        self._watch()

    def pull(self, request_id: str, block_ids: list[int]) -> Pin | None:
        """Return the pin, whose blocks are free then; None if these blocks cannot be pulled (again)."""
        pin = self._ledger.pull(request_id, block_ids)
        if pin is None:
            self._metrics.late_notifications.inc()
            return self._expired.get(request_id)
        return self._freed(pin)

    def push(self, request_id: str) -> None:
        """Free the blocks: a decode worker has the KV cache."""
        self._freed(self._ledger.push(request_id))

    def refuse(self) -> None:
        """Refuse a decode worker that asks for what is not there any more."""
        self._ledger.unknown += 1
        self._metrics.late_notifications.inc()

    def extend(self, request_id: str) -> None:
        self._ledger.extend(request_id, self.next_end())

    def release(self, request_id: str) -> None:
        """Free the blocks without a transfer. Nothing happens if they are not pinned any more."""
        self._freed(self._ledger.release(request_id))

    def stop(self) -> None:
        """Stop: no lease ends any more."""
        if self._expiry is not None:
            self._expiry.cancel()

    def _freed(self, pin: Pin | None) -> Pin | None:
        if pin is not None:
            self._free(pin.block_ids)
        return pin

    def _watch(self) -> None:
        deadline = self._ledger.next_deadline()
        if deadline is not None and self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        for pin in self._ledger.expire(asyncio.get_running_loop().time()):
            self._metrics.kv_expired.inc()
            self._freed(pin)
            if self._late_pulls == "stale":
                self._expired[pin.request_id] = _overwritten(pin)
            pin.on_expiry()
        self._watch()
