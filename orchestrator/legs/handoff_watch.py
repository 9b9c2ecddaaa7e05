"""Hand-offs that are under way are looked after here until their answers begin.

**What begins late is not relayed.** A prefill worker pins blocks until its lease ends. A decode worker that
pulls after that gets what may be another prompt's by then, and says that all is well (vLLM 0.32). So a leg
that has not begun its answer at `KvLease.good_until` is ended, and its request starts again from prefill. Of
a stream the first event shows that it has begun. A whole answer shows nothing before it ends, perhaps long
after the lease; there the decode worker is asked (`wire/info.py`, `Begun`). One that cannot say, plain vLLM,
has its answer believed if no lease of the prefill worker has run out from before the end of this one until
the answer is there.

vLLM's decode workers extend the leases of what waits in their queues, of which nobody here hears. A hand-off
that has waited for so long is better off elsewhere.

**What stalls is noticed early.** A leg without its first byte for `handoff_stall_s` is tried elsewhere, from
prefill on, once per request, if
- nothing came from its worker on any leg for so long: the engine stands still. The first bytes that its legs
  had to wait for lately are the measure, so an engine that is slow, or that makes whole answers, has more
  time; or
- it is overtaken: a leg that was sent to that worker later has begun. Engines admit what waits for memory in
  the order in which it came, so a leg that only waits in the queue is never overtaken by a later one, and its
  hand-off has not stalled. (A grammar that takes long to compile is overtaken, too: one leg more.)
A long queue is neither. What is moved comes out of the budget for replacements, so that engines that stand
still do not double the load of the others; and each move makes the worker's measure longer.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final

from orchestrator.config.options import RoutingConfig
from orchestrator.errors import HandoffLate, HandoffStalled
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.legs.ledger import KvLease, Watch
from orchestrator.legs.leg import AnswerLeg
from orchestrator.legs.retry import RetryBudget
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker

LEAST_STALL_S: Final = 2.0  # an engine may do something else for so long: garbage, graphs, another's prompt
UNKNOWN_STALL_S: Final = 10.0  # of a worker that has begun no answer yet, and may have to warm up
SLOWEST_TIMES: Final = 3.0  # so many times the slowest first byte of late is no delay any more
LOOK_S: Final = 0.25  # legs are looked at so often

_READY: Final = WorkerState.READY


class HandoffWatch(Watch):
    """It looks after the hand-offs of a process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        budget: RetryBudget,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """`start` runs work that may outlast its request."""
        self._dispatcher = dispatcher
        self._budget = budget
        self._start = start
        self._stall_s: float | None = None
        self._looked = 0.0  # the moment of the last look
        self._moved = 0  # legs, in that moment: they have not taken from the budget yet

    def reconfigure(self, routing: RoutingConfig) -> None:
        """Go by this section from now on."""
        self._stall_s = routing.handoff_stall_s

    def look(self, leg: AnswerLeg, lease: KvLease, now: float) -> None:
        if leg.bodies.is_stream:
            if now >= lease.good_until:
                self._end_late(leg)
                return
        elif now + LOOK_S >= lease.good_until and not lease.is_asked_for:
            lease.is_asked_for = True
            self._start(self._ask(leg, lease))
            return
        waited_s = now - leg.sent
        if not leg.legs.has_stalled and waited_s >= self._limit_s(leg.worker):
            self._look_for_stall(leg, waited_s, now)

    # --- late -----------------------------------------------------------------------------------

    def _end_late(self, leg: AnswerLeg) -> None:
        leg.give_up(HandoffLate(f"{leg.worker.name} had not begun its answer when the KV lease ended"))

    async def _ask(self, leg: AnswerLeg, lease: KvLease) -> None:
        """Find out whether a whole answer is being made, before the lease is over."""
        dispatcher = self._dispatcher
        try:
            async with asyncio.timeout(lease.expires - dispatcher.time()):
                has_begun = await dispatcher.has_begun(leg.worker, leg.id)
                if has_begun is None:
                    count = await dispatcher.expired_leases(lease.worker)
                    if count is not None:
                        lease.expires = math.inf  # what became of it is known when the leg ends
                        leg.settle_doubt = functools.partial(self._settle, leg, lease, count)
                        return
        except TimeoutError:
            has_begun = False
        if has_begun:
            lease.consume()
        elif leg.answer is not None and not leg.answer.is_complete:
            self._end_late(leg)

    async def _settle(self, leg: AnswerLeg, lease: KvLease, before: float) -> None:
        """Judge a whole answer by the leases that have run out. Raises `HandoffLate`."""
        if await self._dispatcher.expired_leases(lease.worker) != before:
            raise HandoffLate(f"nobody can say whether {leg.worker.name} was in time for the KV lease")
        lease.consume()

    # --- stalled --------------------------------------------------------------------------------

    def _limit_s(self, worker: Worker) -> float:
        """Return how long a leg may have no byte."""
        if self._stall_s is not None:
            return self._stall_s
        slowest_s = worker.handoffs.first_byte_s
        return max(LEAST_STALL_S, SLOWEST_TIMES * slowest_s) if slowest_s else UNKNOWN_STALL_S

    def _look_for_stall(self, leg: AnswerLeg, waited_s: float, now: float) -> None:
        worker = leg.worker
        is_silent = now - worker.heard >= self._limit_s(worker)
        is_overtaken = leg.bodies.is_stream and worker.handoffs.newest_begun > leg.sent
        if not ((is_silent or is_overtaken) and self._has_other(leg) and self._may_move(now)):
            return
        leg.legs.has_stalled = True
        worker.handoffs.first_byte_s = max(worker.handoffs.first_byte_s, waited_s)
        what = "nothing has come on any of its legs" if is_silent else "later legs have begun"
        leg.give_up(HandoffStalled(f"no first byte from {worker.name} for {waited_s:.1f} s, and {what}"))

    def _has_other(self, leg: AnswerLeg) -> bool:
        """Tell whether another decode worker is ready that has not failed this request."""
        decode = self._dispatcher.registry.pools[leg.legs.model].decode
        return any(
            other is not leg.worker and other.state is _READY and other not in (leg.legs.failed or ())
            for other in decode
        )

    def _may_move(self, now: float) -> bool:
        """Tell whether the budget has room for one more. Those moved in the same moment have not taken their
        part yet.
        """
        if now != self._looked:
            self._looked, self._moved = now, 0
        if self._moved >= self._budget.room:
            return False
        self._moved += 1
        return True
