"""Gives KV blocks back to prefill workers when no decode leg will pull them, and ends legs that nobody wants
any more so that it is known what becomes of their blocks: it pays what the ledger owes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final

from orchestrator.errors import BatonError, WorkerCutShort, WorkerError, WorkerGarbage, WorkerUnreachable
from orchestrator.legs.connectors.nixl import Handoff, InvalidHandoff, handoff_from, handoff_from_msgpack
from orchestrator.legs.dispatch import Dispatcher, note_unreachable
from orchestrator.legs.ledger import KvLease, LeaseLedger
from orchestrator.legs.retry import is_unread
from orchestrator.relay.job import Job
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.base import Answer
from orchestrator.wire.sse import ABORTED, ENDED_BY_WORKER
from orchestrator.workers.registry import Registry, Worker

# How long a release leg may take to be answered. The lease it saves lasts 30 s.
RELEASE_TIMEOUT_S: Final = 10.0

# A prefill answer holds block ids and one token: 1 MiB is enough for over 100,000 blocks.
MAX_PREFILL_ANSWER_BYTES: Final = 16 * 1024 * 1024

# As `ABORTED` in an answer in msgpack; no string can contain it, for it is no UTF-8.
ABORTED_MSGPACK: Final = b"\xadfinish_reason\xa5abort"

# How long a prefill may go on when its request has ended: to finish costs less than the blocks that stay
# pinned for 30 s if its connection is closed in the moment in which it answers.
GRACE_S = 0.05

# How long a worker may take to say that it ends a request.
END_LEG_S: Final = 0.25

# How long an answer is waited for each time that the worker has been asked to end it: when it was asked
# first, its engine may not have had the request yet. In all, as long as blocks stay pinned.
LAST_WORDS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

# The same for a worker that is told by half of its connection being closed.
LEAVE_S: Final = 1.0

_log: Final = logging.getLogger("baton.releases")


class Releases:
    """Release legs under way; one per process. `aclose` waits for them."""

    def __init__(self, dispatcher: Dispatcher, registry: Registry, ledger: LeaseLedger) -> None:
        self._dispatcher = dispatcher
        self._registry = registry
        self._ledger = ledger
        self._tasks: set[asyncio.Task[None]] = set()

    def release(self, job: Job, lease: KvLease) -> None:
        """Have the blocks pulled and freed, in the background: nobody waits for it, `aclose` does."""
        lease.is_handed_back = True
        if not self._ledger.is_good(lease):
            return
        job.legs += 1  # the number of this one: the job itself may go on
        self._start(self._send(job.aside(), lease))

    def abandon_prefill(self, job: Job, worker: Worker, answer: Answer) -> None:
        """Stop a prefill whose request has ended; an answer that is on its way means pinned blocks."""
        if answer.status and answer.status != 200:
            answer.abort()
        else:
            self._start(self._see_off(job.aside(), worker, answer))

    async def _see_off(self, job: Job, worker: Worker, answer: Answer) -> None:
        try:
            content = await self._last_words(job, worker, answer)
        except WorkerError:
            return
        finally:
            answer.abort()
        if content is None or answer.status != 200:
            return
        with contextlib.suppress(WorkerError):  # no hand-off in it, so nothing is pinned
            self.release(job, self._ledger.lease(worker, read_handoff(answer, content)))

    async def _last_words(self, job: Job, worker: Worker, answer: Answer) -> bytes | None:
        """The answer of a prefill that nobody wants any more; None if it does not come. Raises `WorkerError`.

        Closing the connection drops an answer that the engine has made and the server has not written yet,
        and with it all knowledge of the blocks that it pins.
        """
        content = await _read(answer, GRACE_S)
        if content is None:
            content = await self._end(job, worker, answer)
        if content is None and worker.unendable_epoch == worker.epoch:
            answer.leave()
            content = await _read(answer, LEAVE_S)
        return content

    def abandon_decode(self, job: Job, lease: KvLease, answer: Answer) -> None:
        """Stop a decode leg whose request has ended before it was known that the hand-off was taken.

        A worker that has not given the leg to its engine yet forgets it when its connection is closed, and
        nobody pulls the blocks. So the worker is asked to end it; that it has been says where they are.
        """
        job.lease = None
        self._start(self._see_decode_off(job.aside(), lease, answer))

    async def _see_decode_off(self, job: Job, lease: KvLease, answer: Answer) -> None:
        worker = job.plan.decode
        try:
            content = await self._end(job, worker, answer)
        except WorkerError:
            return
        finally:
            answer.abort()
        if is_unread(answer.status):
            lease.unuse()
            self.release(job, lease)
        elif (content is not None and answer.status == 200) or worker.unendable_epoch == worker.epoch:
            # A leg that ends in its engine has its blocks pulled, or freed on the other side. Of a worker
            # that knows no other end than a closed connection this is taken for granted: it mostly is so.
            lease.consume()

    async def _end(self, job: Job, worker: Worker, answer: Answer) -> bytes | None:
        """Ask a worker to end the last leg: its answer, None if there is none. Raises `WorkerError`."""
        for seconds in LAST_WORDS_S:
            if answer.is_complete or not await self._end_leg(job, worker):
                break
            if (content := await _read(answer, seconds)) is not None:
                return content
        return answer.body_nowait()

    async def _end_leg(self, job: Job, worker: Worker) -> bool:
        try:
            return await asyncio.wait_for(self._dispatcher.end_leg(job, worker), END_LEG_S)
        except TimeoutError:
            return True  # it has been asked, and is slow to say so

    def settle(self, job: Job) -> None:
        """The job goes on without its hand-off, or has ended: what is held of it goes back."""
        lease, job.lease = job.lease, None
        if lease is not None and lease.state is LeaseState.HELD:
            self.release(job, lease)

    async def aclose(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                while self._tasks:  # one that sees a prefill off may start another
                    await asyncio.wait(self._tasks)
        if self._tasks:  # of workers that do not answer any more
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, job: Job, lease: KvLease) -> None:
        try:
            await self._ask(job, lease)
        except (BatonError, TimeoutError) as error:
            _log.warning("KV of %s stays pinned until its lease ends: %r", lease.worker.name, error)

    async def _ask(self, job: Job, lease: KvLease) -> None:
        handoff, worker = lease.handoff, self._releaser(job)
        async with asyncio.timeout(RELEASE_TIMEOUT_S):
            try:
                answer = await self._dispatcher.send(
                    job, worker, lambda codec, model: job.bodies.release(codec, model, handoff, job.id)
                )
            except WorkerUnreachable as error:
                note_unreachable(self._registry, worker, error)
                raise
            try:
                await answer.head()
            finally:
                answer.abort()
        if answer.status == 200:
            lease.release()

    def _releaser(self, job: Job) -> Worker:
        """A decode worker, if possible one that has not just failed this request.

        There is one: it was planned when the prefill was sent. Who does both in its place would answer a
        release leg, but know nothing of hand-offs, and pull nothing.
        """
        planned, failed = job.plan.decode, (*job.avoid, job.worker)
        ready = self._registry.pools[job.view.model].decode
        if planned in ready and planned not in failed:
            return planned
        choices = [worker for worker in (*ready, planned, *failed) if worker.address.role == "decode"]
        return next((worker for worker in choices if worker not in failed), choices[0])


async def _read(answer: Answer, seconds: float) -> bytes | None:
    """An answer, if it comes within this time. Raises `WorkerError`."""
    try:
        return await asyncio.wait_for(answer.read(MAX_PREFILL_ANSWER_BYTES), seconds)
    except TimeoutError:
        return None


def read_handoff(answer: Answer, content: bytes, *, has_ids: bool = False) -> Handoff:
    """What a prefill worker answered. Raises `WorkerCutShort` if it has ended the request by itself, else
    `WorkerGarbage`.
    """
    is_packed = answer.headers.get(b"content-type") == b"application/msgpack"
    try:
        return handoff_from_msgpack(content) if is_packed else handoff_from(content, has_ids=has_ids)
    except InvalidHandoff as error:
        if (ABORTED_MSGPACK if is_packed else ABORTED) in content:
            raise WorkerCutShort(ENDED_BY_WORKER) from error
        raise WorkerGarbage(str(error)) from error
