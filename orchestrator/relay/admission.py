"""Admission decides who may begin: a request takes a seat on a decode worker before anything of it is sent,
or waits for one.

A seat is counted over all decode workers of a model (and those of role `both`), not on one of them: which
worker serves the request is the planner's choice, right after. So no prefill ends, and pins KV blocks,
while there is nobody to decode. The permit lasts from the plan to the end of the answer, whatever legs are
replaced in between.

| a request that | gets |
|---|---|
| comes while a seat is free | a permit at once: nobody waits then |
| comes while none is free | a place in the queue, in the order of `relay/turns.py` or of arrival |
| comes while the queue is full, or would wait for too long to be answered in time | 429 |
| comes while the queue is full, and another API key has more there for its weight | that one's newest place |
| is first in the queue with too little time left for an answer | 429; the seat goes to the next one |
| has waited for `timeout_s` | 503 |
| asks for a model without any worker | a permit: the planner says what is missing |

Where there are API keys, each has a line of its own in the queue (`relay/fairness.py`).

So under overload seats go to requests that can still be answered before their deadline, and the other
clients know at once.

Where several processes or orchestrators send to the same workers, each has a queue of its own, and none talks
to the others: what these have taken is seen by their legs. Those of other processes are in shared memory,
those of other orchestrators are what the workers have told last. Each has its share, which it takes without
a look. Beyond that it may take what is left: an orchestrator by the last report, a process by a look for each
seat. Those who have more than their share leave room as their requests end.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

from orchestrator.config.options import DEFAULT_SEATS, QueueConfig
from orchestrator.errors import BatonError, Overloaded, TooBusy
from orchestrator.relay.fairness import Lines
from orchestrator.relay.forecast import Forecast
from orchestrator.relay.turns import MOST_PRIORITY, Turns, behind_s
from orchestrator.relay.waiting import Charge, SeatPromise, Waiter
from orchestrator.relay.waiting import Demand as Demand
from orchestrator.telemetry.counters import RejectReason, Telemetry
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker

# Prefill workers have no seats: they queue by themselves, one prompt after another.
SEATED: Final[tuple[Role, Role]] = ("decode", "both")

SWEEP_S: Final = 0.25  # how late a wait that is over may be noticed, and seats that legs elsewhere have left
LOOK_S: Final = 0.02  # the same of seats while somebody waits for one that others may give back

# A request is let in if it could wait half again as long as is expected: then nearly all that wait are
# served, and the others know at once. Without it one in ten of those sent away heard of it only when its
# turn had come.
_CAUTION: Final = 1.5

_LONGEST_RETRY_AFTER_S: Final = 60  # an estimate is not worth more


class Gate:
    """A gate has the seats of one model, and the queue for them. It is changed on the event loop only.

    While `free` is above 0 nobody waits, so `gate.free -= 1` is a permit then; else `wait` gives one. Each
    is owed one `give_back`. `free` is negative when there are fewer seats left than requests hold.
    """

    __slots__ = (
        "_bytes",
        "_cell",
        "_forecast",
        "_full",
        "_is_ordered",
        "_limits",
        "_lines",
        "_model",
        "_telemetry",
        "_time",
        "_tokens",
        "_turns",
        "_waiters",
        "_work",
        "free",
        "look",
        "seats",
    )

    def __init__(
        self,
        model: str,
        index: int,
        limits: QueueConfig,
        telemetry: Telemetry,
        time: Callable[[], float],
        *,
        is_fair: bool = False,
    ) -> None:
        """`index` is the model's in the config. With `is_fair` seats are shared among tenants."""
        self.free = 0
        self.seats = 0
        self._model = model
        self._full = f"the queue for the model '{model}' is full"
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()  # a queue that can be left from its middle
        # Of the same: tenants by their shares, or all by their turns. Else the first to come is the first.
        self._lines: Lines | None = Lines() if is_fair else None
        self._turns: Turns[Waiter] | None = None
        self._work = 0.0  # the mean of what those ask for who have to wait
        self.reconfigure(limits)
        self._telemetry = telemetry
        self._time = time
        self._cell = telemetry.layout.queue_cell(index)
        self._tokens = 0
        self._bytes = 0
        # Only requests that ended while no seat was free count: others wait for such as these.
        self._forecast = Forecast()
        # It resizes the gate so that as many more can be given as there are, of so many that are wanted. It
        # is called before somebody has to wait, and before a seat is given to the next one. None: nobody else
        # takes seats.
        self.look: Callable[[int], None] | None = None

    def __repr__(self) -> str:
        return f"<Gate {self._model} seats={self.seats} free={self.free} waiting={len(self._waiters)}>"

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @property
    def is_ordered(self) -> bool:
        """It matters what somebody asks for who has to wait."""
        return self._is_ordered

    @property
    def weighs(self) -> bool:
        """It matters how much work it is."""
        return self._is_ordered or self._lines is not None

    async def wait(self, demand: Demand) -> Charge | None:
        """Wait for a permit. Return what was charged for it, for `give_back`. Raises `TooBusy` or
        `Overloaded`; then, or if cancelled, nothing is held.
        """
        if self.look is not None and self.take():
            return None
        if not self.seats:
            self.free -= 1
            return None
        seat: asyncio.Future[BatonError | None] = asyncio.get_running_loop().create_future()
        waiter = self.enqueue(demand, seat)
        try:
            refusal = await seat
        except BaseException:
            self._leave(waiter)
            raise
        if refusal is not None:
            raise refusal
        return waiter.charge

    def give_back(self, record: RequestRecord, charge: Charge | None = None) -> None:
        """Give back the permit of a request that has ended, and what was charged for it."""
        free = self.free
        self.free = free + 1
        if charge is not None:
            self._settle(charge, self._time() - record.admitted)
        if free <= 0 and self.seats:
            self._forecast.learn(record, self._time())
            if self.look is not None:
                self.look(len(self._waiters))
            self._dispatch()

    def take(self) -> bool:
        """Take a permit if there is one, also one that others have left; return whether it was taken."""
        if self.free <= 0 and self.look is not None:
            self.look(len(self._waiters) + 1)
        if self.free <= 0:
            return False
        self.free -= 1
        return True

    def reconfigure(self, limits: QueueConfig) -> None:
        """Bound the queue by these limits; requests that wait already stay, but not for longer than the new
        limits let them. They keep their turns; where turns are new, those are as they came.
        """
        self._limits = limits
        self._is_ordered = is_ordered = limits.order == "shortest" or limits.priority_s > 0
        if self._lines is not None:
            return  # a line has turns in any case
        if is_ordered and self._turns is None:
            self._turns = Turns()
            for waiter in self._waiters:
                self._turns.add(waiter)
        elif not is_ordered:
            self._turns = None

    def resize(self, seats: int) -> None:
        """Let there be so many seats from now on."""
        self.free += seats - self.seats
        self.seats = seats
        self._dispatch()

    def sweep(self) -> None:
        """Send away those that have waited for too long."""
        latest = self._time() - self._limits.timeout_s
        while (first := self._oldest()) is not None and first.since <= latest:
            message = f"no seat for the model '{self._model}' within {self._limits.timeout_s:g} s"
            error = Overloaded(message, retry_after_s=self._retry_after_s())
            self._end(first, self._refused(error, RejectReason.WAITED, first.demand))
        if self._lines is not None and not self._waiters:
            self._lines.forget()

    # --- the queue ------------------------------------------------------------------------------

    def enqueue(self, demand: Demand, seat: SeatPromise) -> Waiter:
        """Put a request into the queue: `seat` is set when its wait is over. Raises `TooBusy`."""
        now = self._time()
        losers = self._losers(demand)
        if losers is None:
            raise self._too_busy(self._full, RejectReason.QUEUE_FULL, demand)
        at = now + self._late_s(demand) if self._is_ordered else now
        if not self._may_wait(demand, now, at):
            raise self._too_late(demand)
        for loser in losers:
            self._push_out(loser)
        waiter = Waiter(demand, now, at, seat)
        self._waiters[waiter] = None
        if self._lines is not None:
            self._lines.add(waiter)
        elif self._turns is not None:
            self._turns.add(waiter)
        self._count(demand, 1)
        return waiter

    def _push_out(self, waiter: Waiter) -> None:
        """Have somebody leave for somebody else."""
        if waiter.seat.done():  # it was stopped a moment ago
            self._remove(waiter)
        else:
            message = f"{self._full}, and this API key has more than its share of it"
            self._end(waiter, self._too_busy(message, RejectReason.OVER_SHARE, waiter.demand))

    def _late_s(self, demand: Demand) -> float:
        """Return by how much its turn comes after its arrival (`relay/turns.py`)."""
        limits = self._limits
        late_s = 0.0
        if limits.order == "shortest":
            self._work += (demand.work - self._work) / 16 if self._work else demand.work
            own_s = self._forecast.held_s.mean * demand.work / self._work if self._work else 0.0
            late_s = behind_s(own_s, limits.timeout_s / 2)
        if limits.priority_s and demand.priority:
            priority = max(-MOST_PRIORITY, min(demand.priority, MOST_PRIORITY))
            late_s += max(-limits.timeout_s, min(priority * limits.priority_s, limits.timeout_s))
        return late_s

    def _leave(self, waiter: Waiter) -> None:
        """Forget a request that was stopped: before its turn, or with the permit on its way."""
        if waiter in self._waiters:
            self._remove(waiter)
        elif not waiter.seat.cancelled() and waiter.seat.result() is None:
            self.free += 1
            if self._lines is not None and waiter.charge is not None:
                self._lines.refund(waiter.charge)
            self._dispatch()

    def _settle(self, charge: Charge, held_s: float) -> None:
        """Set right what was charged. A line falls behind by no more than others take while half of the
        longest wait goes by.
        """
        if self._lines is not None:
            self._lines.settle(charge, held_s, self.seats * self._limits.timeout_s / 2)

    def _dispatch(self) -> None:
        """Give free seats to those who wait; if there are no seats at all any more, nobody waits for one."""
        now = self._time() if self._waiters else 0.0
        while (self.free > 0 or not self.seats) and (first := self._first()) is not None:
            if self.seats and not self._forecast.may_begin(first.demand, now):
                self._end(first, self._too_late(first.demand))
            else:
                self.free -= 1
                if self._lines is not None:
                    first.charge = self._lines.charge(first)
                self._end(first, None)

    def _first(self) -> Waiter | None:
        """Return who is next. A request that was stopped a moment ago is not."""
        if self._lines is None and self._turns is None:
            return self._oldest()
        while (waiter := self._foremost()) is not None:
            if not waiter.seat.done():
                return waiter
            self._remove(waiter)
        return None

    def _foremost(self) -> Waiter | None:
        """Return who stands first, where that is not simply who came first."""
        if self._lines is not None:
            return self._lines.first()
        return None if self._turns is None else self._turns.first()

    def _oldest(self) -> Waiter | None:
        """Return who of those that wait has come first."""
        while self._waiters:
            waiter = next(iter(self._waiters))
            if not waiter.seat.done():
                return waiter
            self._remove(waiter)
        return None

    def _end(self, waiter: Waiter, error: BatonError | None) -> None:
        """End a wait: with a permit, or with this error."""
        self._remove(waiter)
        waiter.seat.set_result(error)

    def _remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter]
        waiter.is_over = True
        if self._lines is not None:
            self._lines.remove(waiter)
        elif self._turns is not None:
            self._turns.tidy(len(self._waiters))
        self._count(waiter.demand, -1)

    def _losers(self, demand: Demand) -> list[Waiter] | None:
        """Return who has to leave for it to have room: nobody, as a rule. None: nobody will."""
        limits = self._limits
        requests = len(self._waiters) + 1 - limits.requests
        tokens = self._tokens + demand.tokens - limits.tokens
        size = self._bytes + demand.size - limits.bytes
        if requests <= 0 and tokens <= 0 and size <= 0:
            return []
        return None if self._lines is None else self._lines.losers(demand, [requests, tokens, size])

    def _count(self, demand: Demand, sign: int) -> None:
        self._tokens += sign * demand.tokens
        self._bytes += sign * demand.size
        row, cell = self._telemetry.cells, self._cell
        row[cell], row[cell + 1], row[cell + 2] = len(self._waiters), self._tokens, self._bytes
        if demand.tenant is not None:
            demand.tenant.wait(sign)

    # --- what is to be expected -----------------------------------------------------------------

    def _may_wait(self, demand: Demand, now: float, at: float) -> bool:
        """Tell whether it would have its turn soon enough, and be answered in time then; `at` is its turn."""
        if self._is_in_time(demand, now, len(self._waiters)):
            return True
        if self._lines is not None:
            return self._is_in_time(demand, now, self._lines.ahead_of(demand, at))
        turns = self._turns
        return turns is not None and self._is_in_time(demand, now, turns.ahead_of(at))

    def _is_in_time(self, demand: Demand, now: float, ahead: int) -> bool:
        wait_s = self._forecast.wait_s(ahead, self.seats) * _CAUTION
        return wait_s <= self._limits.timeout_s and self._forecast.is_in_time(demand, now + wait_s)

    # --- refusals -------------------------------------------------------------------------------

    def _too_late(self, demand: Demand) -> TooBusy:
        message = f"the model '{self._model}' is too busy to answer in time"
        return self._too_busy(message, RejectReason.TOO_LATE, demand)

    def _too_busy(self, message: str, reason: RejectReason, demand: Demand) -> TooBusy:
        error = TooBusy(message, retry_after_s=self._retry_after_s())
        self._refused(error, reason, demand)
        return error

    def _refused(self, error: BatonError, reason: RejectReason, demand: Demand) -> BatonError:
        self._telemetry.rejected(reason)
        if demand.tenant is not None:
            demand.tenant.note_rejected(reason)
        return error

    def _retry_after_s(self) -> int:
        """Return after how many seconds those who wait now will have been served."""
        return max(
            1, min(math.ceil(self._forecast.wait_s(len(self._waiters), self.seats)), _LONGEST_RETRY_AFTER_S)
        )


class Admission:
    """It has the gates of a process, by model; their seats follow the workers."""

    def __init__(
        self,
        pools: Mapping[str, Pools],
        queue: QueueConfig,
        *,
        seats: Mapping[str, Mapping[Role, int]],
        processes: int,
        telemetry: Telemetry,
        time: Callable[[], float],
        is_fair: bool = False,
    ) -> None:
        """`seats` are those of each worker, by model and role. `processes` serve beside one another. With
        `is_fair` tenants share the seats.
        """
        self._processes = processes
        self._contested: set[str] = set()  # models whose seats others take, too
        self._pools = pools
        self._seats = seats
        self.gates = {
            model: Gate(model, index, queue, telemetry, time, is_fair=is_fair)
            for index, model in enumerate(pools)
        }
        for model, found in pools.items():
            found.allot(seats.get(model, {}))
            found.on_update(functools.partial(self._resize, model))
            self._resize(model)

    def reconfigure(self, queue: QueueConfig) -> None:
        """Bound the queues by this section from now on."""
        for gate in self.gates.values():
            gate.reconfigure(queue)

    @property
    def admitted(self) -> int:
        """So many requests hold a permit."""
        return sum(gate.seats - gate.free for gate in self.gates.values())

    async def sweep_forever(self) -> None:
        """End waits that are too long, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S if self.awaits_others else SWEEP_S)
            self.sweep()

    @property
    def awaits_others(self) -> bool:
        """Somebody waits for a seat that others may give back."""
        return any(gate.waiting and model in self._contested for model, gate in self.gates.items())

    def sweep(self) -> None:
        for model, gate in self.gates.items():
            self._resize(model)
            gate.sweep()

    def _resize(self, model: str, wanted: int = 0) -> None:
        gate, found = self.gates[model], Taken.of(self._pools[model], self._seats.get(model, {}))
        is_contested = self._processes > 1 or found.others > 0
        if is_contested is not (model in self._contested):
            (self._contested.add if is_contested else self._contested.discard)(model)
            gate.look = functools.partial(self._resize, model) if is_contested else None
        gate.resize(found.part(gate.seats - gate.free, self._processes, wanted or gate.waiting))


class Taken:
    """The seats of a model at one moment, and who has taken them.

    A worker on trial takes one request. One in slow start has all of its seats: it is asked less often while
    others have room, but nobody waits while it has. Legs that run on workers out of use hold no seat of the
    others, so ours come on top; as they end, the sum is too high until it is worked out again.
    """

    __slots__ = ("legs", "others", "out_of_use", "replicas", "seats")

    def __init__(self) -> None:
        self.seats = 0  # that there are, for everybody
        self.legs = 0  # of this orchestrator, which have taken as many
        self.others = 0  # taken by other orchestrators
        self.replicas = 1  # orchestrators, this one among them
        self.out_of_use = 0  # legs of this process on workers whose seats do not count

    @classmethod
    def of(cls, pools: Pools, seats: Mapping[Role, int]) -> Taken:
        """Count the seats of the workers that are decoded on."""
        made = cls()
        for role in SEATED:
            workers: tuple[Worker, ...] = getattr(pools, role)
            made.seats += seats.get(role, DEFAULT_SEATS) * len(workers)
            for worker in workers:
                made._add(worker)
        for worker in pools.others:
            if worker.address.role in SEATED:
                made._add_other(worker)
        return made

    def _add(self, worker: Worker) -> None:
        senders = worker.reported.senders
        self.legs += worker.legs
        self.others += worker.others
        if senders > self.replicas:
            self.replicas = senders

    def _add_other(self, worker: Worker) -> None:
        if worker.state is WorkerState.PROBING:
            self.seats += 1
        else:
            self.out_of_use += worker.own_legs

    def part(self, held: int, processes: int, wanted: int) -> int:
        """Return how many permits this process, which holds so many, may give in all; 0 if there is no seat.

        That is its share at least, of `processes` of each orchestrator. Beyond that it is what others have
        left; one of several processes gets no more of it than is `wanted` now.
        """
        if not self.seats:
            return 0
        held = max(0, held - self.out_of_use)
        left = self.seats - self.others - max(self.legs, held)
        share = max(1, self.seats // (processes * self.replicas))
        more = max(0, left if processes == 1 else min(left, wanted))
        return max(share, held + more) + self.out_of_use
