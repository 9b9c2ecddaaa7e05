"""A tenant is who has an API key: it is counted, and held to the limits of the key.

| limit | counts | refused with 429, type |
|---|---|---|
| `rpm` | a request when it comes, unless it is refused for this limit or the next one | `requests` |
| `concurrency` | a request until its answer has ended | `requests` |
| `tpm` | when a request comes, what it may use; at its end, what it has used | `tokens` |

All processes count together (`telemetry/tenants.py`). What may differ between them is what flowed into a
bucket within `SWEEP_S`, and what they take in the same microseconds. Names that share the cells of all others
have limits in each process by itself.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable
from typing import Final

from orchestrator.api.view import RequestView
from orchestrator.config.keys import Key, KeyRing
from orchestrator.config.options import TenantsConfig
from orchestrator.config.printing import counted
from orchestrator.errors import RequestsLimited, TokensLimited
from orchestrator.relay.rate import Bucket
from orchestrator.telemetry.counters import RejectReason, Telemetry
from orchestrator.telemetry.record import RequestRecord
from orchestrator.telemetry.tenants import (
    CELLS,
    CHARGED_REQUESTS,
    CHARGED_TOKENS,
    OPEN,
    REJECTED,
    REQUESTS,
    TOKENS,
    USED_REQUESTS,
    USED_TOKENS,
    WAITING,
    KeyCells,
    KeyTable,
)
from orchestrator.wire.usage import tokens_in

SWEEP_S: Final = 0.25  # so often each process looks at what has flowed into the buckets

_BUSY_S: Final = 1  # after which it is worth asking again where an open request must end first


class Tenant:
    """A tenant is one API key. Each of its requests has an `Account`."""

    __slots__ = (
        "_cells",
        "_concurrency",
        "_others",
        "_requests",
        "_telemetry",
        "_tokens",
        "is_limited",
        "name",
        "weight",
    )

    def __init__(self, name: str, cells: KeyCells, others: KeyCells | None, telemetry: Telemetry) -> None:
        """It is counted in `cells`, and among `others` if those are given."""
        self.name = name
        self.weight = 1.0
        self.is_limited = False
        self._cells = cells
        self._others = others
        self._telemetry = telemetry
        self._concurrency = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def __repr__(self) -> str:
        return f"<Tenant {self.name}>"

    def reconfigure(self, key: Key, defaults: TenantsConfig, now: float) -> None:
        """Go by the limits of this key from now on; where it has none, by the defaults."""
        own = key.limits
        self.weight = defaults.weight if own.weight is None else own.weight
        self._concurrency = defaults.concurrency if own.concurrency is None else own.concurrency
        rpm = defaults.rpm if own.rpm is None else own.rpm
        tpm = defaults.tpm if own.tpm is None else own.tpm
        self._requests = self._bucket(self._requests, rpm, CHARGED_REQUESTS, USED_REQUESTS, now)
        self._tokens = self._bucket(self._tokens, tpm, CHARGED_TOKENS, USED_TOKENS, now)
        self.is_limited = bool(self._concurrency or rpm or tpm)

    def _bucket(
        self, bucket: Bucket | None, limit: int, charged: int, used: int, now: float
    ) -> Bucket | None:
        if not limit:
            self._cells.note(used, 0)
            return None
        if bucket is None:
            return Bucket(limit, self._cells, charged, used, now)
        if limit != bucket.limit:
            bucket.change(limit, now)
        return bucket

    # --- a request ------------------------------------------------------------------------------

    def enter(self) -> None:
        """Count a request that has come. One `leave` must follow."""
        self._cells.add(OPEN, 1)
        self._cells.add(REQUESTS, 1)

    def check(self, now: float) -> None:
        """Hold a request that has come to the limits of requests. Raises `RequestsLimited`."""
        most = self._concurrency
        if most and self._cells.sum(OPEN) > most:
            self.reject(RejectReason.KEY_CONCURRENCY)
            raise RequestsLimited(f"this API key may have {counted(most, 'request')} open at a time", _BUSY_S)
        requests = self._requests
        if requests is None:
            return
        if not requests.has(1, now):
            self.reject(RejectReason.KEY_REQUESTS)
            wait_s = math.ceil(requests.wait_s(1))
            most_said = counted(requests.limit, "request")
            message = f"this API key may send {most_said} per minute: ask again in {wait_s} s"
            raise RequestsLimited(message, wait_s)
        requests.take(1)

    @property
    def counts_tokens(self) -> bool:
        """There is a limit of tokens."""
        return self._tokens is not None

    def charge(self, tokens: int, now: float) -> None:
        """Hold a request to the limit of tokens: it may use so many. Raises `TokensLimited`."""
        bucket = self._tokens
        if bucket is None:
            return
        if not bucket.has(tokens, now):
            self.reject(RejectReason.KEY_TOKENS)
            wait_s = math.ceil(bucket.wait_s(tokens))
            message = (
                f"this API key may use {counted(bucket.limit, 'token')} per minute, "
                f"and this request may use {tokens}: "
                f"ask again in {wait_s} s"
            )
            raise TokensLimited(message, wait_s)
        bucket.take(tokens)

    def leave(self, charged: int, used: int) -> None:
        """Count a request that has ended: it was charged so many tokens, and has used so many."""
        self._cells.add(OPEN, -1)
        if used:
            self._cells.add(TOKENS, used)
        if charged != used and self._tokens is not None:
            self._tokens.take(used - charged)
        if self._others is not None:
            self._others.add(REQUESTS, 1)
            self._others.add(TOKENS, used)

    def wait(self, requests: int) -> None:
        """Count requests that wait for a seat, or do no longer."""
        self._cells.add(WAITING, requests)

    def note_rejected(self, reason: RejectReason) -> None:
        """Count a request that was refused, in the name of the key."""
        self._cells.add(REJECTED + reason, 1)
        if self._others is not None:
            self._others.add(REJECTED + reason, 1)

    def reject(self, reason: RejectReason) -> None:
        """Count a request that is refused for a limit of the key."""
        self._telemetry.rejected(reason)
        self.note_rejected(reason)

    # --- what is left ---------------------------------------------------------------------------

    def headers(self, now: float) -> bytes:
        """Return the header block that tells what is left of the limits per minute."""
        lines = "" if self._requests is None else self._requests.headers("requests", now)
        if self._tokens is not None:
            lines += self._tokens.headers("tokens", now)
        return lines.encode()

    def share(self, now: float) -> None:
        """Look at what other processes have used, and let them know."""
        if self._cells.is_shared:
            for bucket in (self._requests, self._tokens):
                if bucket is not None:
                    bucket.share(now)


class Account:
    """An account is one request of a tenant, from its head to its end."""

    __slots__ = ("_charged", "tenant", "view")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.view: RequestView | None = None  # what is asked for, once it is known
        self._charged = 0  # tokens, beforehand
        tenant.enter()

    def check(self, now: float) -> None:
        """Hold it to the limits of requests. Raises `RequestsLimited`."""
        if self.tenant.is_limited:
            self.tenant.check(now)

    def charge(self, tokens: int, now: float) -> None:
        """Hold it to the limit of tokens: it may use so many. Raises `TokensLimited`."""
        self.tenant.charge(tokens, now)
        self._charged = tokens

    def headers(self, now: float) -> bytes:
        """Return what the tenant is told of its limits, as a header block."""
        return self.tenant.headers(now) if self.tenant.is_limited else b""

    def close(self, record: RequestRecord) -> None:
        """Count what it has used, as its usage tells. Without one, each piece of a stream counts as a token,
        and an answer as what was expected of it.
        """
        prompt, answer = tokens_in(record.usage)
        if prompt is None and (answer or record.status == 200) and self.view is not None:
            prompt = self.view.prompt_tokens()
        used = (prompt or 0) + (answer or 0)
        if record.status == 200 and not record.usage and self._charged:
            used = self._charged
        self.tenant.leave(self._charged, used)


class Tenants:
    """It has the tenants of a process, by the names of their keys."""

    def __init__(
        self,
        keys: KeyRing,
        defaults: TenantsConfig,
        table: KeyTable,
        telemetry: Telemetry,
        time: Callable[[], float],
    ) -> None:
        self.table = table
        self._keys = keys
        self._telemetry = telemetry
        self._time = time
        self._by_name: dict[str, Tenant] = {}
        self.reconfigure(defaults)

    def reconfigure(self, defaults: TenantsConfig) -> None:
        """Go by the keys of the ring as they are now, and by these defaults. A name that stays keeps what it
        has used.
        """
        now, before = self._time(), self._by_name
        self.table.add([key.name for key in self._keys])
        self._by_name = {key.name: before.get(key.name) or self._made(key.name) for key in self._keys}
        for key in self._keys:
            self._by_name[key.name].reconfigure(key, defaults, now)

    def _made(self, name: str) -> Tenant:
        cells = self.table.cells_of(name)
        if cells is not None:
            return Tenant(name, cells, None, self._telemetry)
        row = array("q", bytes(8 * CELLS))
        return Tenant(name, KeyCells(row, [row], 0), self.table.others, self._telemetry)

    def of(self, name: str) -> Tenant | None:
        """Return the tenant whose key has this name."""
        return self._by_name.get(name)

    def open(self, name: str) -> Account | None:
        """Open the account of a request with the key of this name. One `close` must follow."""
        tenant = self._by_name.get(name)
        return None if tenant is None else Account(tenant)

    async def sweep_forever(self) -> None:
        """Share with other processes what was used, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        now = self._time()
        for tenant in self._by_name.values():
            if tenant.is_limited:
                tenant.share(now)
