"""Worker handles: who they are, what state they are in, how busy they are.

Everything here is changed on the event loop only, and by the registry (`workers.py`) where nothing else is
said. Where several processes serve, a worker's legs, and when it was heard, are known over all of them.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import msgspec

from orchestrator.rows import SharedLoad
from orchestrator.states import WorkerState
from orchestrator.topology import WorkerAddress
from orchestrator.transport.base import Origin
from orchestrator.wire.codec import JSON, Codec
from orchestrator.wire.info import TokenIds, WorkerInfo

NEVER = float("-inf")


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a worker, apart from its load: the same in all processes, but for moments."""

    address: WorkerAddress
    slot: int  # its cell in shared memory
    state: WorkerState
    epoch: int  # how often it has come into service: tells what was seen before its return
    is_drained: bool
    warm_from: float
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
    is_drained: bool = False  # takes no new legs until the operator says so, whatever its state


class Worker(ABC):
    """One worker. `in_flight` is changed by leases only, `heard` and `failures` also by the flow."""

    __slots__ = (
        "address",
        "answered",
        "codec",
        "credit",
        "distrusted_epoch",
        "doubted",
        "ejections",
        "epoch",
        "failures",
        "info",
        "is_drained",
        "is_leaving",
        "last_error",
        "max_model_len",
        "name",
        "origin",
        "proven_epoch",
        "retry_at",
        "serves_since",
        "slot",
        "state",
        "token_ids",
        "unendable_epoch",
        "verdict_at",
        "warm_from",
    )

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None, slot: int) -> None:
        """`slot` numbers it among those that share memory. Moments are `time.monotonic()`."""
        self.address = address
        self.slot = slot
        self.name = address.name
        self.origin = Origin(address.host, address.port, tls)
        self.state = WorkerState.STARTING
        self.epoch = 0
        self.info: WorkerInfo | None = None
        self.codec: Codec = JSON
        self.token_ids: tuple[TokenIds, ...] = ()  # forms that it gives and takes, the best first
        self.unendable_epoch = -1  # in which it did not know how to end a request
        self.proven_epoch = -1  # in which it took a leg in the form that it announced
        self.distrusted_epoch = -1  # in which it refused one
        self.max_model_len: int | None = None
        self.last_error: str | None = None
        self.failures = 0  # legs in a row that were answered with a 5xx; 0 once one succeeded
        # What the operator wants.
        self.is_drained = False
        self.is_leaving = False  # to be removed once it is free
        # Suspicion: known only to the process that probes.
        self.answered = NEVER  # when a probe last was
        self.doubted = NEVER  # when it became suspect
        self.verdict_at = NEVER  # suspect: until when it must give a sign of life
        self.ejections = 0  # in a row
        self.retry_at = NEVER  # ejected: when it is probed again
        self.serves_since = NEVER  # when it was last taken into full service
        # Slow start.
        self.warm_from = NEVER  # when it began
        self.credit = 0.0  # towards its next turn; belongs to `Pools`

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state} in_flight={self.in_flight}>"

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Legs under way on this worker."""

    @property
    @abstractmethod
    def heard(self) -> float:
        """When anything last came on any leg; written by whoever looks at open legs."""

    @heard.setter
    @abstractmethod
    def heard(self, moment: float) -> None: ...

    @abstractmethod
    def lease(self) -> AbstractContextManager[Worker]:
        """A place on this worker, held for the length of a leg."""

    def standing(self) -> Standing:
        return Standing(
            address=self.address,
            slot=self.slot,
            state=self.state,
            epoch=self.epoch,
            is_drained=self.is_drained,
            warm_from=self.warm_from,
            info=self.info,
            max_model_len=self.max_model_len,
            last_error=self.last_error,
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.address,
            self.state,
            self.in_flight,
            self.info,
            self.max_model_len,
            self.last_error,
            self.is_drained,
        )


class OwnWorker(Worker):
    """A worker that only this process sends to."""

    __slots__ = ("_lease", "heard", "in_flight")
    heard: float
    in_flight: int

    def __init__(self, address: WorkerAddress, tls: ssl.SSLContext | None, slot: int) -> None:
        super().__init__(address, tls, slot)
        self.heard = NEVER
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
    """A worker that several processes send to: `in_flight` and `heard` are those of all."""

    __slots__ = ("_lease", "_load", "own_legs")

    def __init__(
        self, address: WorkerAddress, tls: ssl.SSLContext | None, slot: int, load: SharedLoad
    ) -> None:
        super().__init__(address, tls, slot)
        self._load = load
        self.own_legs = load.own_legs  # one cell, changed by leases only
        self._lease = SharedLease(self)

    @property
    def in_flight(self) -> int:
        return sum(self._load.legs)

    @property
    def heard(self) -> float:
        return max(self._load.heard_us) / 1e6

    @heard.setter
    def heard(self, moment: float) -> None:
        self._load.own_heard_us[0] = int(moment * 1e6)

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
