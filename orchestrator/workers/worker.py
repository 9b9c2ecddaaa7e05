"""A worker has a name and an address, a state, and a load.

Everything here is changed on the event loop only, and by the registry (`workers/registry.py`) and its judge
where nothing else is said. Where several processes serve, a worker's legs, and when it was heard, are known
over all of them.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from typing import Final

from orchestrator.config.addresses import WorkerAddress
from orchestrator.transport.base import Origin
from orchestrator.wire.compatibility import revision_of
from orchestrator.workers.abilities import Abilities
from orchestrator.workers.figures import NO_FIGURES, CacheFigures, cache_status
from orchestrator.workers.handoff_times import HandoffTimes
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.reported import Reported
from orchestrator.workers.snapshot import WorkerSnapshot, WorkerStatus
from orchestrator.workers.states import NEVER, Life, Suspicion, WorkerState

_UNKNOWN: Final = Introduction(None, None)
MAX_DIGITS: Final = 8  # of a number of legs


class Worker(ABC):
    """A worker's legs are counted by its seats alone; the flow changes `failures` too."""

    __slots__ = (
        "abilities",
        "address",
        "answered",
        "credit",
        "epoch",
        "failures",
        "gets_credential",
        "handoffs",
        "introduction",
        "is_denied",
        "is_drained",
        "is_leaving",
        "kv_tokens",
        "last_error",
        "name",
        "origin",
        "rank_header",
        "reason",
        "reported",
        "revision",
        "slot",
        "state",
        "suspicion",
        "warm_from",
        "zone",
    )

    def __init__(self, address: WorkerAddress, transport: str, tls: ssl.SSLContext | None, slot: int) -> None:
        """`transport` is what the worker may be sent: json, orjson or msgpack.

        `slot` numbers it among those that share memory. Moments are `time.monotonic()`.
        """
        self.address = address
        self.slot = slot
        self.name = address.name
        rank = address.rank  # what the head of its legs says, as a header block
        self.rank_header = b"" if rank is None else b"x-data-parallel-rank: %d\r\n" % rank
        self.gets_credential = address.gets_credential
        self.origin = Origin(address.host, address.port, tls)
        self.state = WorkerState.STARTING
        self.epoch = 0
        self.introduction = _UNKNOWN  # of the last time that it came into service
        self.abilities = Abilities(transport)
        self.handoffs = HandoffTimes()
        self.reported = Reported()
        self.kv_tokens: int | None = None  # that fit into its KV cache
        self.revision: str | None = None  # pairs can be kept within one; None if it does not say
        self.zone: str | None = address.zone  # hand-offs within one take the same time
        self.last_error: str | None = None  # for the operator
        self.reason: str | None = None  # the same in words that everybody may read (`workers/troubles.py`)
        self.is_denied = False  # a leg was denied, and no probe has shown since that requests are served
        self.failures = 0  # legs in a row that were answered with a 5xx; 0 once one succeeded
        # What the operator wants.
        self.is_drained = False
        self.is_leaving = False  # to be removed once it is free
        self.answered = NEVER  # when a probe last was
        self.suspicion = Suspicion()
        # Slow start.
        self.warm_from = NEVER  # when it began
        self.credit = 0.0  # towards its next turn; belongs to `Pools`

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state} in_flight={self.in_flight}>"

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Return how many legs are under way on this worker: ours, and those of other orchestrators as far as
        they are known.
        """

    @property
    @abstractmethod
    def legs(self) -> int:
        """Return how many legs of this orchestrator are under way on this worker."""

    @property
    @abstractmethod
    def own_legs(self) -> int:
        """Return how many of these are of this process."""

    @property
    @abstractmethod
    def others(self) -> int:
        """Return how many legs other orchestrators had there when the worker last told."""

    @abstractmethod
    def note_others(self, legs: int) -> None:
        """Note how many legs other orchestrators have there."""

    @property
    @abstractmethod
    def heard(self) -> float:
        """Return when anything last came on any leg."""

    @abstractmethod
    def note_heard(self, moment: float) -> None:
        """Note that something came on a leg at `moment`; whoever looks at open legs calls this."""

    @abstractmethod
    def cache_figures(self) -> CacheFigures:
        """Return what is known of its caches."""

    @abstractmethod
    def note_cache_figures(self, figures: CacheFigures) -> None:
        """Note what this process knows of its caches."""

    @abstractmethod
    def count_leg(self, change: int) -> None:
        """Count one leg more, or one less; the leg's owner calls this, once for each."""

    # --- what it announces ----------------------------------------------------------------------

    def announce(self, introduction: Introduction) -> None:
        """Note what the worker says of itself; one without our plugin gets plain JSON."""
        self.introduction = introduction
        info = introduction.info
        self.kv_tokens = None if info is None else info.kv_tokens
        self.revision = revision_of(info)
        self.zone = self.address.zone or (None if info is None else info.zone)
        self.handoffs.lease_s = None if info is None else info.kv_lease_s
        self.abilities.announce(info, self.epoch)

    @property
    def takes_streams(self) -> bool:
        """Return whether it announces that many legs may share a connection."""
        info = self.introduction.info
        return info is not None and "mux" in info.streams

    def distrust(self) -> None:
        """Send plain JSON from now on until the worker is restarted, as it has refused what it announced."""
        self.abilities.distrusted_epoch = self.epoch
        self.abilities.announce(self.introduction.info, self.epoch)

    # --- what it reports ------------------------------------------------------------------------

    def note_load(self, header: bytes) -> None:
        """Note what the answer of a leg says of the worker's load (`wire/load.py`). It may be anything."""
        if self.reported.is_heard:
            others = header.partition(b",")[0]
            if len(others) < MAX_DIGITS and others.isdigit():
                self.note_others(int(others))

    # --- what happens to it ---------------------------------------------------------------------

    def life(self) -> Life:
        return Life(
            state=self.state,
            epoch=self.epoch,
            failures=self.failures,
            suspicion=self.suspicion,
            warm_from=self.warm_from,
            credit=self.credit,
        )

    def become(self, life: Life) -> None:
        """Take on what an event has changed. Only the judge and a registry that follows call this."""
        self.state = life.state
        self.epoch = life.epoch
        self.failures = life.failures
        self.suspicion = life.suspicion
        self.warm_from = life.warm_from
        self.credit = life.credit

    # --- what others are told of it -------------------------------------------------------------

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            address=self.address,
            slot=self.slot,
            state=self.state,
            epoch=self.epoch,
            is_drained=self.is_drained,
            warm_from=self.warm_from,
            info=self.introduction.info,
            max_model_len=self.introduction.max_model_len,
            last_error=self.last_error,
            reason=self.reason,
            adapters=self.introduction.adapters,
            drains_itself=self.reported.drains_itself,
            senders=self.reported.senders,
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.address,
            self.state,
            self.legs,
            self.introduction.info,
            self.introduction.max_model_len,
            self.last_error,
            self.is_drained,
            self.reason,
            cache_status(self.cache_figures()),
            self.introduction.adapters,
            self.reported.drains_itself,
            self.reported.last,
        )


class OwnWorker(Worker):
    """Only this process sends to such a worker."""

    __slots__ = ("_figures", "_heard", "_legs", "_others")

    def __init__(self, address: WorkerAddress, transport: str, tls: ssl.SSLContext | None, slot: int) -> None:
        super().__init__(address, transport, tls, slot)
        self._figures = NO_FIGURES
        self._heard = NEVER
        self._legs = 0
        self._others = 0

    @property
    def in_flight(self) -> int:
        return self._legs + self._others

    @property
    def legs(self) -> int:
        return self._legs

    @property
    def own_legs(self) -> int:
        return self._legs

    @property
    def others(self) -> int:
        return self._others

    def note_others(self, legs: int) -> None:
        self._others = legs

    @property
    def heard(self) -> float:
        return self._heard

    def note_heard(self, moment: float) -> None:
        self._heard = moment

    def cache_figures(self) -> CacheFigures:
        return self._figures

    def note_cache_figures(self, figures: CacheFigures) -> None:
        self._figures = figures

    def count_leg(self, change: int) -> None:
        self._legs += change


class SharedLoad:
    """The legs under way on one worker are counted here, and when something last came on one, and what is
    known of its caches.

    The memory has a cell per row, and of `CacheFigures` all cells.
    """

    __slots__ = ("figures", "heard_us", "legs", "others", "own_figures", "own_heard_us", "own_legs")

    def __init__(
        self,
        legs: memoryview,
        own_legs: memoryview,
        heard_us: memoryview,
        own_heard_us: memoryview,
        figures: list[memoryview],
        own_figures: memoryview,
        others: memoryview,
    ) -> None:
        """`own_legs`, `own_heard_us` and `own_figures` are the cells that this process may write. `others` is
        one that all may write: the last one to have heard of legs of other orchestrators knows best.

        Moments are in microseconds of `time.monotonic()`, which is the same in all processes.
        """
        self.legs = legs
        self.own_legs = own_legs
        self.heard_us = heard_us
        self.own_heard_us = own_heard_us
        self.figures = figures
        self.own_figures = own_figures
        self.others = others


class SharedWorker(Worker):
    """Several processes send to such a worker: `in_flight` and `heard` are those of all."""

    __slots__ = ("_load", "_others", "_own_legs")

    def __init__(
        self, address: WorkerAddress, transport: str, tls: ssl.SSLContext | None, slot: int, load: SharedLoad
    ) -> None:
        super().__init__(address, transport, tls, slot)
        self._load = load
        self._own_legs = load.own_legs  # one cell
        self._others = load.others  # one cell

    @property
    def in_flight(self) -> int:
        return sum(self._load.legs) + self._others[0]

    @property
    def legs(self) -> int:
        return sum(self._load.legs)

    @property
    def own_legs(self) -> int:
        return self._own_legs[0]

    @property
    def others(self) -> int:
        return self._others[0]

    def note_others(self, legs: int) -> None:
        self._others[0] = legs

    @property
    def heard(self) -> float:
        return max(self._load.heard_us) / 1e6

    def note_heard(self, moment: float) -> None:
        self._load.own_heard_us[0] = int(moment * 1e6)

    def cache_figures(self) -> CacheFigures:
        return CacheFigures(*map(sum, zip(*self._load.figures, strict=True)))

    def note_cache_figures(self, figures: CacheFigures) -> None:
        for place, value in enumerate(figures):
            self._load.own_figures[place] = value

    def count_leg(self, change: int) -> None:
        self._own_legs[0] += change
