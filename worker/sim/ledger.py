"""The prefill side's ledger has KV blocks that are pinned for a decode worker, each under a lease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


def _nothing() -> None:
    """Do nothing: nobody waits for the end of a lease."""


@dataclass(frozen=True, slots=True)
class Pin:
    """These are KV blocks of a computed prompt. `deadline` is in the event loop's time."""

    request_id: str
    block_ids: list[int]
    digest: bytes
    num_tokens: int
    deadline: float
    on_expiry: Callable[[], None] = _nothing


class Ledger:
    """Who pulls, pushes or releases a pin gets it exactly once; the caller then frees its blocks."""

    def __init__(self) -> None:
        self._pins: dict[str, Pin] = {}
        self._lost: set[str] = set()
        self.pinned = 0
        self.pulled = 0
        self.pushed = 0
        self.released = 0  # given up without a transfer
        self.expired = 0
        self.unknown = 0  # asked for, but never pinned, transferred before, or expired

    def pin(self, pin: Pin, *, is_lost: bool = False) -> None:
        self._pins[pin.request_id] = pin
        self.pinned += 1
        if is_lost:
            self._lost.add(pin.request_id)

    def pull(self, request_id: str, block_ids: list[int]) -> Pin | None:
        """Return the pin, whose blocks the caller frees; None if these blocks cannot be pulled (again)."""
        pin = self._pins.get(request_id)
        if pin is None or pin.block_ids != block_ids or request_id in self._lost:
            self.unknown += 1
            return None
        self.pulled += 1
        return self._pins.pop(request_id)

    def extend(self, request_id: str, deadline: float) -> None:
        """Renew the lease: the decode worker still wants it."""
        if request_id in self._pins:
            self._pins[request_id] = replace(self._pins[request_id], deadline=deadline)

    def push(self, request_id: str) -> Pin | None:
        """Return the pin, whose blocks the caller frees: its KV cache is with a decode worker."""
        pin = self._remove(request_id)
        self.pushed += pin is not None
        return pin

    def release(self, request_id: str) -> Pin | None:
        pin = self._remove(request_id)
        self.released += pin is not None
        return pin

    def expire(self, now: float) -> list[Pin]:
        """Return the pins whose lease is over; the caller frees their blocks."""
        over = [pin for pin in self._pins.values() if pin.deadline <= now]
        for pin in over:
            self._remove(pin.request_id)
        self.expired += len(over)
        return over

    def next_deadline(self) -> float | None:
        return min((pin.deadline for pin in self._pins.values()), default=None)

    def describe(self, now: float) -> dict[str, Any]:
        pins = [
            {
                "request_id": pin.request_id,
                "block_ids": pin.block_ids,
                "num_tokens": pin.num_tokens,
                "expires_in_s": round(pin.deadline - now, 3),
            }
            for pin in self._pins.values()
        ]
        names = ("pinned", "pulled", "pushed", "released", "expired", "unknown")
        return {"pins": pins, **{name: getattr(self, name) for name in names}}

    def _remove(self, request_id: str) -> Pin | None:
        self._lost.discard(request_id)
        return self._pins.pop(request_id, None)
