"""Worker handles: who they are, what state they are in, how busy they are.

Everything here is changed on the event loop only: states by `health.py` and by a leg that was refused,
counts by leases. Where several processes serve, states come from the supervisor (`membership.py`), and a
worker's legs are counted over all of them.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

import msgspec

from orchestrator.rows import SharedLoad
from orchestrator.topology import WorkerAddress
from orchestrator.transport.base import Origin
from orchestrator.wire.codec import CODECS, JSON, Codec
from orchestrator.wire.info import Role, TokenIds, WorkerInfo


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


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a worker, apart from its load: the same in all processes, but for moments."""

    name: str
    state: WorkerState
    epoch: int  # how often it has become ready: tells a refusal from before its return
    info: WorkerInfo | None
    max_model_len: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker at one moment, for the admin API and the metrics."""

    address: WorkerAddress
    state: WorkerState
    in_flight: int  # legs that hold a lease on this worker now
    info: WorkerInfo | None  # None until announced, and for workers without our plugin
    max_model_len: int | None
    last_error: str | None


class Worker(ABC):
    """One worker. `in_flight` is changed by leases only, everything else by the registry only."""

    __slots__ = (
        "address",
        "codec",
        "distrusted_epoch",
        "epoch",
        "info",
        "last_error",
        "max_model_len",
        "name",
        "origin",
        "proven_epoch",
        "state",
        "token_ids",
    )

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None) -> None:
        self.address = address
        self.name = address.name
        self.origin = Origin(address.host, address.port, tls)
        self.state = WorkerState.STARTING
        self.epoch = 0
        self.info: WorkerInfo | None = None
        self.codec: Codec = JSON
        self.token_ids: tuple[TokenIds, ...] = ()  # forms that it gives and takes, the best first
        self.proven_epoch = -1  # in which it took a leg in the form that it announced
        self.distrusted_epoch = -1  # in which it refused one
        self.max_model_len: int | None = None
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state} in_flight={self.in_flight}>"

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Legs under way on this worker."""

    @abstractmethod
    def lease(self) -> AbstractContextManager[Worker]:
        """A place on this worker, held for the length of a leg."""

    def standing(self) -> Standing:
        return Standing(
            name=self.name,
            state=self.state,
            epoch=self.epoch,
            info=self.info,
            max_model_len=self.max_model_len,
            last_error=self.last_error,
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.address, self.state, self.in_flight, self.info, self.max_model_len, self.last_error
        )


class OwnWorker(Worker):
    """A worker that only this process sends to."""

    __slots__ = ("_lease", "in_flight")
    in_flight: int

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None) -> None:
        super().__init__(address, tls)
        self.in_flight = 0
        self._lease = Lease(self)

    def lease(self) -> Lease:
        return self._lease


class Lease:
    """Counts one leg on a worker between enter and exit. One for all legs: it holds nothing else."""

    __slots__ = ("_worker",)

    def __init__(self, worker: OwnWorker) -> None:
        self._worker = worker

    def __enter__(self) -> Worker:
        self._worker.in_flight += 1
        return self._worker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.in_flight -= 1


class SharedWorker(Worker):
    """A worker that several processes send to: `in_flight` counts the legs of all."""

    __slots__ = ("_everyone", "_lease", "own_legs")

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None, load: SharedLoad) -> None:
        super().__init__(address, tls)
        self._everyone = load.everyone
        self.own_legs = load.own  # one cell, changed by leases only
        self._lease = SharedLease(self)

    @property
    def in_flight(self) -> int:
        return sum(self._everyone)

    def lease(self) -> SharedLease:
        return self._lease


class SharedLease:
    """`Lease` where others count too."""

    __slots__ = ("_worker",)

    def __init__(self, worker: SharedWorker) -> None:
        self._worker = worker

    def __enter__(self) -> Worker:
        self._worker.own_legs[0] += 1
        return self._worker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.own_legs[0] -= 1


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

    def __init__(
        self,
        addresses: Sequence[WorkerAddress],
        models: Iterable[str],
        transport: str,
        loads: Sequence[SharedLoad] | None = None,
    ) -> None:
        """`transport` is what the orchestrator may send: json, orjson or msgpack.

        `loads`, one per address, are given where other processes send to the same workers.
        """
        self._transport = transport
        self.workers = _workers(addresses, loads)
        self.pools = {model: Pools(model) for model in models}
        self._on_gone: list[Callable[[Worker], None]] = []
        self._on_change: list[Callable[[], None]] = []

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(worker.status() for worker in self.workers)

    def standings(self) -> tuple[Standing, ...]:
        return tuple(worker.standing() for worker in self.workers)

    def on_gone(self, callback: Callable[[Worker], None]) -> None:
        """`callback` is called, from the event loop, each time a worker stops taking requests."""
        self._on_gone.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """`callback` is called, from the event loop, whenever a standing may have changed."""
        self._on_change.append(callback)

    def announce(self, worker: Worker, info: WorkerInfo | None, max_model_len: int | None) -> None:
        """Note what a worker says of itself; None for one without our plugin, which gets plain JSON."""
        worker.info = info
        worker.max_model_len = max_model_len
        if worker.distrusted_epoch == worker.epoch:
            info = None
        is_understood = info is not None and self._transport in info.decodes
        worker.codec = CODECS[self._transport] if is_understood else JSON
        forms = info.token_ids if info is not None else ()
        worker.token_ids = tuple(form for form in _ID_FORMS[self._transport] if form in forms)
        self._tell_change()

    def distrust(self, worker: Worker) -> None:
        """A worker has refused what it announced: plain JSON for it from now on, until it is restarted."""
        worker.distrusted_epoch = worker.epoch
        self.announce(worker, worker.info, worker.max_model_len)

    def mark_ready(self, worker: Worker) -> None:
        worker.last_error = None
        if worker.state is not WorkerState.READY:
            worker.epoch += 1
            self._move(worker, WorkerState.READY)
        self._tell_change()

    def mark_gone(self, worker: Worker, why: str) -> None:
        """A worker that refused, or failed its probe, takes no more requests until a probe succeeds."""
        worker.last_error = why
        if worker.state is WorkerState.READY:
            self._move(worker, WorkerState.GONE)
            for callback in self._on_gone:
                callback(worker)
        self._tell_change()

    def adopt(self, worker: Worker, standing: Standing) -> None:
        """Take over what the process that probes knows; states that lay in between are not seen.

        A worker that was ready before it refused us stays gone: that standing is older than the refusal.
        """
        is_outdated = worker.state is WorkerState.GONE and standing.epoch <= worker.epoch
        if is_outdated and standing.state is WorkerState.READY:
            return
        worker.epoch = standing.epoch
        self.announce(worker, standing.info, standing.max_model_len)
        worker.last_error = standing.last_error
        worker.state = standing.state
        self._refresh(self.pools[worker.address.model])

    def _tell_change(self) -> None:
        for callback in self._on_change:
            callback()

    def _move(self, worker: Worker, state: WorkerState) -> None:
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


def _workers(addresses: Sequence[WorkerAddress], loads: Sequence[SharedLoad] | None) -> tuple[Worker, ...]:
    is_https = [address.url.startswith("https:") for address in addresses]
    tls = ssl.create_default_context() if any(is_https) else None  # reads all certificates: 30 ms
    contexts = [tls if is_secure else None for is_secure in is_https]
    if loads is None:
        return tuple(map(OwnWorker, addresses, contexts))
    parts = zip(addresses, contexts, loads, strict=True)
    return tuple(SharedWorker(address, context, load) for address, context, load in parts)


# Token ids by transport, the best first: packed ones cost a fifth of a list to read, and bin needs no base64.
_ID_FORMS: dict[str, tuple[TokenIds, ...]] = {
    "json": ("list",),
    "orjson": ("base64", "list"),
    "msgpack": ("bin", "base64", "list"),
}
_ROLES: tuple[Role, Role, Role] = ("prefill", "decode", "both")
