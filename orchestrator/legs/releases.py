"""Releases give KV blocks back to prefill workers when no decode leg will pull them, and end legs that nobody
wants any more so that it is known what becomes of their blocks: they pay what the ledger owes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final

from orchestrator.errors import BatonError, OutOfResources, WorkerAnswered, WorkerError, WorkerUnfit
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.legs.ledger import KvLease, LeaseLedger
from orchestrator.legs.leg import MAX_PREFILL_ANSWER_BYTES, AnswerLeg, Leg, PrefillLeg, ReleaseLeg
from orchestrator.legs.retry import is_unread
from orchestrator.routing.revisions import goes_with
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.base import Answer
from orchestrator.workers.worker import Worker

# A release leg may take so long to be answered. The lease it saves lasts 30 s.
RELEASE_TIMEOUT_S: Final = 10.0

# A prefill may go on for so long when its request has ended: to finish costs less than the blocks that stay
# pinned for 30 s if its connection is closed in the moment in which it answers.
GRACE_S = 0.05

# A worker may take so long to say that it ends a request.
END_LEG_S: Final = 0.25

# An answer is waited for so long each time that the worker has been asked to end it: when it was asked
# first, its engine may not have had the request yet. In all, as long as blocks stay pinned.
LAST_WORDS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

# A worker that is told by half of its connection being closed has so long to answer.
LEAVE_S: Final = 1.0

_log: Final = logging.getLogger("baton.releases")


class Releases:
    """It sends release legs, and ends legs that nobody wants; one per process. `aclose` waits for them."""

    def __init__(self, dispatcher: Dispatcher, ledger: LeaseLedger) -> None:
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._tasks: set[asyncio.Task[None]] = set()

    # --- hand-offs that nobody will use ---------------------------------------------------------

    def settle(self, prefill: PrefillLeg) -> None:
        """Give back what its worker holds for its hand-off, which nobody goes on with."""
        if prefill.lease is not None and prefill.lease.state is LeaseState.HELD:
            self.release(prefill, prefill.lease)

    def release(self, prefill: PrefillLeg, lease: KvLease) -> None:
        """Have the blocks pulled and freed, in the background: nobody waits for it but `aclose`."""
        lease.is_handed_back = True
        if self._ledger.is_good(lease):
            self.start(self._send(self._release_leg(prefill, lease), prefill, lease))

    def _release_leg(self, prefill: PrefillLeg, lease: KvLease) -> ReleaseLeg:
        return ReleaseLeg(prefill.legs, self._releaser(prefill), prefill.bodies, lease.handoff)

    def _releaser(self, prefill: PrefillLeg) -> Worker:
        """Choose a decode worker, if possible one that has not just failed this request.

        There is one: it was planned when the prefill was sent. Who does both in its place would answer a
        release leg, but know nothing of hand-offs, and pull nothing. One of another revision may be unable to
        pull them: engines of two versions refuse each other.
        """
        planned, legs = prefill.decode, prefill.legs
        ready = self._dispatcher.registry.pools[legs.model].decode
        fit = [worker for worker in ready if goes_with(prefill.worker.revision, worker.revision, True)]
        if planned in (fit or ready) and not legs.has_failed(planned):
            return planned
        choices = [worker for worker in (*fit, planned) if worker.address.role == "decode"]
        return next((worker for worker in choices if not legs.has_failed(worker)), choices[0])

    async def _send(self, leg: ReleaseLeg, prefill: PrefillLeg, lease: KvLease) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                if not await self._is_served(leg, lease):
                    another = self._release_leg(prefill, lease)
                    with another:
                        await self._ask(another, lease)
        except (BatonError, TimeoutError) as error:
            _log.warning("KV of %s stays pinned until its lease ends: %r", lease.worker.name, error)

    async def _is_served(self, leg: ReleaseLeg, lease: KvLease) -> bool:
        """Send it; return whether the worker was fit for it: one that is not is left out from now on."""
        try:
            with leg:
                await self._ask(leg, lease)
        except WorkerUnfit:
            return False
        return True

    async def _ask(self, leg: ReleaseLeg, lease: KvLease) -> None:
        try:
            await leg.read(MAX_PREFILL_ANSWER_BYTES, only_head=True)
            lease.release()
        except WorkerAnswered as error:
            if not (is_unread(error.status) and leg.has_freed(error.content)):
                raise
            lease.release()
        finally:
            if leg.answer is not None:
                leg.answer.abort()

    # --- legs that nobody wants any more --------------------------------------------------------

    def abandon_prefill(self, leg: PrefillLeg) -> None:
        """Stop a prefill whose request has ended; an answer that is on its way means pinned blocks."""
        answer = leg.answer
        if answer is None:  # nothing was written
            return
        if answer.status and answer.status != 200:
            answer.abort()
        else:
            self.start(self._see_off(leg, answer))

    async def _see_off(self, leg: PrefillLeg, answer: Answer) -> None:
        try:
            content = await self._last_words(leg, answer)
        except (WorkerError, OutOfResources):
            return
        finally:
            answer.abort()
        if content is None or answer.status != 200 or leg.bodies.connector.sends_both_at_once:
            return
        with contextlib.suppress(WorkerError):  # no hand-off in it, so nothing is pinned
            self.release(leg, self._ledger.lease(leg.worker, leg.handoff(content)))

    async def _last_words(self, leg: Leg, answer: Answer) -> bytes | None:
        """Return the answer of a prefill that nobody wants any more; None if it does not come. Raises
        `WorkerError`.

        Closing the connection drops an answer that the engine has made and the server has not written yet,
        and with it all knowledge of the blocks that it pins.
        """
        worker = leg.worker
        content = await _read(answer, GRACE_S)
        if content is None:
            content = await self._end(leg, answer)
        if content is None and not worker.abilities.can_end(worker.epoch):
            answer.leave()
            content = await _read(answer, LEAVE_S)
        return content

    def abandon_decode(self, leg: AnswerLeg, prefill: PrefillLeg, lease: KvLease) -> None:
        """Stop a decode leg whose request has ended before it was known that the hand-off was taken.

        A worker that has not given the leg to its engine yet forgets it when its connection is closed, and
        nobody pulls the blocks. So the worker is asked to end it; that it has been says where they are.
        """
        self.start(self._see_decode_off(leg, leg.written, prefill, lease))

    async def _see_decode_off(
        self, leg: AnswerLeg, answer: Answer, prefill: PrefillLeg, lease: KvLease
    ) -> None:
        worker = leg.worker
        try:
            content = await self._end(leg, answer)
        except (WorkerError, OutOfResources):
            return
        finally:
            answer.abort()
        if is_unread(answer.status):
            lease.unuse()
            if content is not None and leg.has_freed(content):
                lease.release()
            else:
                self.release(prefill, lease)
        elif (content is not None and answer.status == 200) or not worker.abilities.can_end(worker.epoch):
            # A leg that ends in its engine has its blocks pulled, or freed on the other side. Of a worker
            # that knows no other end than a closed connection this is taken for granted: it mostly is so.
            lease.consume()

    async def _end(self, leg: Leg, answer: Answer) -> bytes | None:
        """Ask a worker to end a leg; return its answer, None if there is none. Raises `WorkerError`."""
        for seconds in LAST_WORDS_S:
            if answer.is_complete or not await self._end_leg(leg):
                break
            if (content := await _read(answer, seconds)) is not None:
                return content
        return answer.body_nowait()

    async def _end_leg(self, leg: Leg) -> bool:
        try:
            return await asyncio.wait_for(self._dispatcher.end_leg(leg.worker, leg.id), END_LEG_S)
        except TimeoutError:
            return True  # it has been asked, and is slow to say so

    # --- tasks ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                while self._tasks:  # one that sees a prefill off may start another
                    await asyncio.wait(self._tasks)
        if self._tasks:  # of workers that do not answer any more
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that may outlast its request; `aclose` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _read(answer: Answer, seconds: float) -> bytes | None:
    """Read an answer, if it comes within this time; else return None. Raises `WorkerError`."""
    try:
        return await asyncio.wait_for(answer.read(MAX_PREFILL_ANSWER_BYTES), seconds)
    except TimeoutError:
        return None
