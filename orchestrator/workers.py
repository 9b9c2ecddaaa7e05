"""Worker handles: who they are, what state they are in, how busy they are.

Everything here is changed on the event loop only: states by `health.py` and by a leg that was refused,
counts by leases.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from orchestrator.topology import WorkerAddress
from orchestrator.transport.base import Origin
from orchestrator.wire.codec import CODECS, JSON, Codec
from orchestrator.wire.info import Role, WorkerInfo


class WorkerState(StrEnum):
    """A worker takes requests only in READY."""

    STARTING = "starting"  # never answered a probe yet
    READY = "ready"
    GONE = "gone"  # answered before, refuses or fails now; probes bring it back


_NEXT: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset({WorkerState.READY}),
    WorkerState.READY: frozenset({WorkerState.GONE}),
    WorkerState.GONE: frozenset({WorkerState.READY}),
}


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker at one moment, for the admin API and the metrics."""

    address: WorkerAddress
    state: WorkerState
    in_flight: int  # legs that hold a lease on this worker now
    info: WorkerInfo | None  # None until announced, and for workers without our plugin
    max_model_len: int | None
    last_error: str | None


class Worker:
    """One worker. `in_flight` is changed by leases only, `state` by the registry only."""

    __slots__ = (
        "address",
        "codec",
        "in_flight",
        "info",
        "last_error",
        "max_model_len",
        "name",
        "origin",
        "state",
    )

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None) -> None:
        self.address = address
        self.name = address.name
        self.origin = Origin(address.host, address.port, tls)
        self.state = WorkerState.STARTING
        self.in_flight = 0
        self.info: WorkerInfo | None = None
        self.codec: Codec = JSON
        self.max_model_len: int | None = None
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<Worker {self.name} {self.state} in_flight={self.in_flight}>"

    def lease(self) -> Lease:
        """A place on this worker, held for the length of a leg."""
        return Lease(self)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.address, self.state, self.in_flight, self.info, self.max_model_len, self.last_error
        )


class Lease:
    """Counts one leg on a worker between enter and exit."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __enter__(self) -> Worker:
        self._worker.in_flight += 1
        return self._worker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.in_flight -= 1


class Pools:
    """The workers of one model that take requests now, by role. Tuples are replaced, never changed."""

    __slots__ = ("both", "decode", "model", "prefill")

    def __init__(self, model: str) -> None:
        self.model = model
        self.prefill: tuple[Worker, ...] = ()
        self.decode: tuple[Worker, ...] = ()
        self.both: tuple[Worker, ...] = ()

    def problem(self) -> str | None:
        """Why no request for this model can be served now; None if there is a whole path."""
        if self.both or (self.prefill and self.decode):
            return None
        missing = [role for role in ("prefill", "decode") if not getattr(self, role)]
        return f"no {' and no '.join(missing)} worker is ready"


class Registry:
    """All workers, and for each model those that are ready."""

    def __init__(self, addresses: Iterable[WorkerAddress], models: Iterable[str], transport: str) -> None:
        """`transport` is what the orchestrator may send: json, orjson or msgpack."""
        self._transport = transport
        self._tls = ssl.create_default_context()
        self.workers = tuple(self._worker(address) for address in addresses)
        self.pools = {model: Pools(model) for model in models}
        self._on_gone: list[Callable[[Worker], None]] = []

    def _worker(self, address: WorkerAddress) -> Worker:
        return Worker(address, self._tls if address.url.startswith("https:") else None)

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(worker.status() for worker in self.workers)

    def on_gone(self, callback: Callable[[Worker], None]) -> None:
        """`callback` is called, from the event loop, each time a worker stops taking requests."""
        self._on_gone.append(callback)

    def announce(self, worker: Worker, info: WorkerInfo | None, max_model_len: int | None) -> None:
        """Note what a worker says of itself; None for one without our plugin, which gets plain JSON."""
        worker.info = info
        worker.max_model_len = max_model_len
        is_understood = info is not None and self._transport in info.decodes
        worker.codec = CODECS[self._transport] if is_understood else JSON

    def mark_ready(self, worker: Worker) -> None:
        worker.last_error = None
        self._move(worker, WorkerState.READY)

    def mark_gone(self, worker: Worker, why: str) -> None:
        """A worker that refused, or failed its probe, takes no more requests until a probe succeeds."""
        worker.last_error = why
        if worker.state is not WorkerState.READY:
            return
        self._move(worker, WorkerState.GONE)
        for callback in self._on_gone:
            callback(worker)

    def _move(self, worker: Worker, state: WorkerState) -> None:
        if state is worker.state:
            return
        if state not in _NEXT[worker.state]:
            raise RuntimeError(f"{worker.name} cannot go from {worker.state} to {state}")
        worker.state = state
        self._refresh(self.pools[worker.address.model])

    def _refresh(self, pools: Pools) -> None:
        pools.prefill, pools.decode, pools.both = (self._ready(pools.model, role) for role in _ROLES)

    def _ready(self, model: str, role: Role) -> tuple[Worker, ...]:
        return tuple(
            worker
            for worker in self.workers
            if worker.state is WorkerState.READY
            and (worker.address.model, worker.address.role) == (model, role)
        )


_ROLES: tuple[Role, Role, Role] = ("prefill", "decode", "both")
