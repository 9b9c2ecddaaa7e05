"""Gives KV blocks back to prefill workers when no decode leg will pull them: it pays what the ledger owes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from copy import copy
from typing import Any

from orchestrator.dispatch import Dispatcher, Job, note_unreachable
from orchestrator.errors import BatonError, WorkerError, WorkerGarbage, WorkerUnreachable
from orchestrator.ledger import KvLease, LeaseLedger
from orchestrator.telemetry import LeaseState
from orchestrator.transport.base import Answer
from orchestrator.wire.handoff import Handoff, InvalidHandoff, handoff_from, handoff_from_msgpack
from orchestrator.workers import Registry, Worker

# How long a release leg may take to be answered. The lease it saves lasts 30 s.
RELEASE_TIMEOUT_S = 10.0

# A prefill answer holds block ids and one token: 1 MiB is enough for over 100,000 blocks.
MAX_PREFILL_ANSWER_BYTES = 16 * 1024 * 1024

# How long a prefill may go on when its request has ended: to finish costs less than the blocks that stay
# pinned for 30 s if its connection is closed in the moment in which it answers.
GRACE_S = 0.05

# How long a worker may take to say that it ends a request.
END_LEG_S = 0.25

# How long an answer is waited for once the worker knows that nobody wants it.
LAST_WORDS_S = 1.0

_log = logging.getLogger("baton.releases")


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
        job.legs += 1  # the copy's number: the job itself may go on
        self._start(self._send(copy(job), lease))

    def abandon_prefill(self, job: Job, worker: Worker, answer: Answer) -> None:
        """Stop a prefill whose request has ended; an answer that is on its way means pinned blocks."""
        if answer.status and answer.status != 200:
            answer.abort()
        else:
            self._start(self._see_off(copy(job), worker, answer))

    async def _see_off(self, job: Job, worker: Worker, answer: Answer) -> None:
        try:
            content = await self._last_words(job, worker, answer)
        finally:
            answer.abort()
        if content is None or answer.status != 200:
            return
        with contextlib.suppress(WorkerGarbage):  # no hand-off in it, so nothing is pinned
            self.release(job, self._ledger.lease(worker, read_handoff(answer, content)))

    async def _last_words(self, job: Job, worker: Worker, answer: Answer) -> bytes | None:
        """The answer of a prefill that nobody wants any more, if there is one.

        Closing the connection drops an answer that the engine has made and the server has not written yet,
        and with it all knowledge of the blocks that it pins. So the worker is asked to end the request; only
        if it knows no such call, its connection is half closed.
        """
        with contextlib.suppress(WorkerError):
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(answer.read(MAX_PREFILL_ANSWER_BYTES), GRACE_S)
            if not await self._end_leg(job, worker):
                answer.leave()
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(answer.read(MAX_PREFILL_ANSWER_BYTES), LAST_WORDS_S)
        return None

    async def _end_leg(self, job: Job, worker: Worker) -> bool:
        try:
            return await asyncio.wait_for(self._dispatcher.end_leg(job, worker), END_LEG_S)
        except TimeoutError:
            return True  # it has been asked, and is slow to say so

    def settle(self, job: Job) -> None:
        """The job goes on without its hand-off, or has ended: what is held of it goes back."""
        lease, job.lease = job.lease, None
        if lease is None:
            return
        if lease.state is LeaseState.HELD:
            self.release(job, lease)
        elif job.scope.exchange.is_gone:
            # vLLM pulls the blocks, and frees them on the other side, for a leg that was dropped at once too.
            lease.consume()

    async def aclose(self) -> None:
        while self._tasks:  # one that sees a prefill off may start another
            await asyncio.wait(self._tasks, timeout=RELEASE_TIMEOUT_S)

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


def read_handoff(answer: Answer, content: bytes, *, has_ids: bool = False) -> Handoff:
    """What a prefill worker answered. Raises `WorkerGarbage`."""
    try:
        if answer.headers.get(b"content-type") == b"application/msgpack":
            return handoff_from_msgpack(content)
        return handoff_from(content, has_ids=has_ids)
    except InvalidHandoff as error:
        raise WorkerGarbage(str(error)) from error
