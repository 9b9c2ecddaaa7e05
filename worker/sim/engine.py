"""In the simulated engine prompts get blocks, are computed or received, decode step by step, and are let go.

All state is touched from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import uuid
from bisect import insort
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from worker.load import Figures
from worker.sim import side_channel, text
from worker.sim.blocks import Allocation, BlockPool, hash_blocks
from worker.sim.clock import PrefillClock, StepClock
from worker.sim.faults import Plan
from worker.sim.handoffs.base import KvLost, Source
from worker.sim.handoffs.kinds import Handoffs
from worker.sim.handoffs.leases import Leases
from worker.sim.kv_events import KvEvents
from worker.sim.ledger import Ledger
from worker.sim.metrics import Metrics
from worker.sim.pulse import Pulse
from worker.sim.runs import Prompt, Run
from worker.sim.settings import Settings


class Engine:
    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.engine_id = str(uuid.uuid4())  # a restarted worker is another engine
        published = settings.kv_events
        self._events = KvEvents(published.endpoint, published.replay, published.buffer)
        self.pool = BlockPool(settings.num_blocks, settings.block_size, self._events.removed)
        self.ledger = Ledger()
        self.running = 0
        self.sending = 0  # computed, and waiting for a decode worker to take the KV cache
        self.prompt_tokens = 0  # of prompts that wait or run
        self.aborted = 0
        # By the names of legs, or a number where there is none: ends the request, and it is answered.
        self.under_way: dict[str | int, Callable[[], None]] = {}
        self.begun: set[str | int] = set()  # those of them that have a token
        self.pulse = Pulse()
        self._receiving = 0
        self._leases = Leases(self.ledger, metrics, settings, self._free)
        self._handoffs = Handoffs(self.engine_id, settings, metrics, self._leases, self.pulse)
        self._steps = StepClock(settings.latency)
        self._prefills = PrefillClock(settings.latency)
        self._queue: deque[_Ticket] = deque()
        metrics.watch(
            running=lambda: self.running,
            waiting=lambda: self.waiting,
            kv_usage=lambda: self.pool.usage,
            fetches={
                "waiting_to_start": lambda: sum(ticket.prompt.is_remote for ticket in self._queue),
                "in_progress": lambda: self._receiving,
                "completed_waiting": lambda: 0,  # a received prompt is decoded at once
            },
        )

    @property
    def waiting(self) -> int:
        return sum(ticket.prompt.sequences for ticket in self._queue)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Let others have KV caches from this engine while the block runs."""
        settings, handoffs = self.settings, self._handoffs
        async with (
            self._events.publishing(),
            side_channel.serve(settings.host, settings.side_channel_port, handoffs.answer) as port,
        ):
            handoffs.listens_on(port)
            yield
            await handoffs.stop()
        self._leases.stop()

    @asynccontextmanager
    async def run(self, prompt: Prompt, plan: Plan) -> AsyncIterator[Run]:
        """Run a prompt from the queue to its end. Raises `KvLost` if its hand-off fails.

        Leaving early gives everything back, a hand-off that was not received included.
        """
        hashes = hash_blocks(prompt.tokens, self.settings.block_size, prompt.salt)
        with self._handing_over(prompt) as source, self._counting(prompt):
            reads_cache = prompt.reads_cache and self.settings.caches
            allocation = await self._admit(prompt, hashes if reads_cache else [], source)
            run = Run(prompt, b"", 0, 0, was_received=False, block_ids=allocation.block_ids)
            try:
                await self._fill(run, source, allocation, plan)
                self._commit(prompt, allocation, hashes)
                await self._send(run, plan)
                yield run
            finally:
                self._leave(run)

    async def wait_token(self, run: Run, plan: Plan, *, is_first: bool) -> None:
        """Wait for the next step of a run. A prompt that was computed here brings its first token."""
        if not is_first or run.was_received:
            kv_tokens = self.pool.used * self.settings.block_size
            await self._steps.wait_step(self.running, plan.slow_factor, kv_tokens)
        await self.pulse.wait()

    def finish(self, run: Run, plan: Plan) -> None:
        """Note that all of the run's answers are complete. If a decode worker is to pull, `run.kv` says from
        where.
        """
        if run.prompt.is_for_decode:
            run.kv = self._handoffs.of(run.prompt.kv).finish(run, plan)

    def give_up(self, kv: dict[str, Any] | None) -> None:
        """Give up the hand-off of a request that is refused."""
        if kv and kv.get("do_remote_prefill"):
            self._handoffs.of(kv).refuse(kv)

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; False if prompts are under way."""
        if not self.pool.forget_all():
            return False
        self._events.cleared()
        return True

    def figures(self) -> Figures:
        """Return how busy it is."""
        running = self.running + self.sending
        return Figures(running, self.waiting, self.prompt_tokens, self.pool.usage, self.settings.max_num_seqs)

    @contextmanager
    def _counting(self, prompt: Prompt) -> Iterator[None]:
        self.prompt_tokens += len(prompt.tokens)
        try:
            yield
        finally:
            self.prompt_tokens -= len(prompt.tokens)

    # --- before the first token

    @contextmanager
    def _handing_over(self, prompt: Prompt) -> Iterator[Source | None]:
        """Hold the prompt's hand-offs, from its arrival to its end. The value is where its KV cache comes
        from.
        """
        kind = self._handoffs.of(prompt.kv)
        with kind.expecting(prompt) if prompt.is_for_decode else nullcontext():
            source = kind.source(prompt) if prompt.is_remote else None
            try:
                yield source
            finally:
                if source is not None:
                    source.close()

    async def _admit(self, prompt: Prompt, hashes: list[bytes], source: Source | None) -> Allocation:
        ticket = _Ticket(prompt, hashes, asyncio.get_running_loop().create_future())
        if source is not None:
            source.on_lost = partial(self._dismiss, ticket)
        insort(self._queue, ticket, key=lambda waiting: waiting.prompt.priority)
        self._admit_more()
        try:
            while not ticket.admitted.done():
                await asyncio.wait((ticket.admitted,), timeout=self.settings.heartbeat_s)
                is_waiting = not (ticket.admitted.done() or self.pulse.stands_still)
                if source is not None and is_waiting:
                    source.keep_alive()
            return ticket.admitted.result()
        except asyncio.CancelledError:
            self._withdraw(ticket)
            raise

    def _admit_more(self) -> None:
        while self._queue and self._has_seat(self._queue[0].prompt):
            ticket = self._queue[0]
            allocation = self.pool.allocate(len(ticket.prompt.tokens), ticket.hashes)
            if allocation is None:
                return
            self._queue.popleft()
            self.running += ticket.prompt.sequences
            ticket.admitted.set_result(allocation)

    def _has_seat(self, prompt: Prompt) -> bool:
        return self.running == 0 or self.running + prompt.sequences <= self.settings.max_num_seqs

    def _dismiss(self, ticket: _Ticket, error: KvLost) -> None:
        """Dismiss a prompt whose KV cache is lost: there is no more to wait for, unless it is to be computed
        here.
        """
        if ticket in self._queue and self.settings.load_failure_policy == "fail":
            self.metrics.failed_transfers.inc()
            ticket.admitted.set_exception(error)
            self._withdraw(ticket)

    def _withdraw(self, ticket: _Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._admit_more()
        elif ticket.admitted.exception() is None:
            self._give_back(ticket.prompt, ticket.admitted.result().block_ids)

    async def _fill(self, run: Run, source: Source | None, allocation: Allocation, plan: Plan) -> None:
        prompt = run.prompt
        await self.pulse.wait()
        if plan.slow_s:
            await asyncio.sleep(plan.slow_s)
        if not (source and prompt.reads_cache and await self._receive(run, source, plan)):
            await self._compute(run, allocation, plan)
        forwarded = (prompt.kv or {}).get("remote_prefill_cached_tokens") if prompt.is_remote else None
        if isinstance(forwarded, int):
            run.cached_tokens = forwarded
        self.metrics.prompt_tokens.inc(len(prompt.tokens))

    def _commit(self, prompt: Prompt, allocation: Allocation, hashes: list[bytes]) -> None:
        if self.settings.caches:
            known = self.pool.commit(allocation, hashes)
            if known < len(hashes):
                self._events.stored(hashes, known, prompt.tokens, self.settings.block_size, prompt.salt)

    async def _receive(self, run: Run, source: Source, plan: Plan) -> bool:
        """Receive the KV cache; return False if that failed and the prompt is to be computed here. Raises
        `KvLost`.
        """
        started = asyncio.get_running_loop().time()
        tokens = len(run.prompt.tokens)
        self.metrics.external_queries.inc(tokens)
        self._receiving += 1
        try:
            run.digest = await source.receive(tokens, plan)
        except KvLost:
            self.metrics.failed_transfers.inc()
            if self.settings.load_failure_policy == "fail":
                raise
            return False
        finally:
            self._receiving -= 1
        run.was_received, run.cached_tokens = True, tokens
        self.metrics.external_hits.inc(tokens)
        self.metrics.transfer_seconds.observe(asyncio.get_running_loop().time() - started)
        return True

    async def _compute(self, run: Run, allocation: Allocation, plan: Plan) -> None:
        block_size, tokens = self.settings.block_size, len(run.prompt.tokens)
        run.cached_tokens = allocation.cached_blocks * block_size
        run.created_tokens = tokens // block_size * block_size - run.cached_tokens
        self.metrics.prefix_queries.inc(tokens)
        self.metrics.prefix_hits.inc(run.cached_tokens)
        await self._prefills.compute(tokens, plan.slow_factor, run.cached_tokens, run.prompt.priority)
        await self.pulse.wait()
        digest, weights = text.digest_of(run.prompt.tokens), self.settings.defects.weights
        run.digest = text.garbled(digest, weights) if weights else digest

    async def _send(self, run: Run, plan: Plan) -> None:
        """Push the KV cache if the hand-off is of that kind. Raises `KvLost`.

        A run that waits for a decode worker leaves its seat to others: two workers might wait for each other.
        """
        prompt, kind = run.prompt, self._handoffs.of(run.prompt.kv)
        if not (prompt.is_for_decode and kind.sends):
            return
        self._move_seats(-prompt.sequences)
        try:
            await kind.send(run, plan)
        finally:
            self._move_seats(prompt.sequences)

    def _move_seats(self, sequences: int) -> None:
        self.running += sequences
        self.sending -= sequences
        self._admit_more()

    # --- after the last token

    def _leave(self, run: Run) -> None:
        self._give_back(run.prompt, run.block_ids)

    def _give_back(self, prompt: Prompt, block_ids: list[int]) -> None:
        self.running -= prompt.sequences
        self._free(block_ids)

    def _free(self, block_ids: list[int]) -> None:
        self.pool.free(block_ids)
        self._admit_more()


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request has this place in the queue."""

    prompt: Prompt
    hashes: list[bytes]
    admitted: asyncio.Future[Allocation]
