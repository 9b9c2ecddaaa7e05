"""The simulated engine: prompts get blocks, are computed or pulled, decode step by step, and are let go.

All state is touched from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from worker.sim import side_channel, text
from worker.sim.blocks import Allocation, BlockPool, hash_blocks
from worker.sim.clock import PrefillClock, StepClock
from worker.sim.faults import Plan
from worker.sim.ledger import Ledger, Pin
from worker.sim.metrics import Metrics
from worker.sim.settings import Settings
from worker.sim.side_channel import KvLost, Remote

_HEARTBEATS_PER_LEASE = 6
_LAST_ERRANDS_S = 1.0  # when the worker stops


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request. `kv` is the request's `kv_transfer_params`."""

    request_id: str  # the engine's own, never used twice
    tokens: Sequence[int]
    sequences: int = 1  # answers wanted
    salt: str = ""
    kv: dict[str, Any] | None = None
    reads_cache: bool = True  # prompt logprobs need every token computed here

    @property
    def is_pinned_after(self) -> bool:
        return bool(self.kv and self.kv.get("do_remote_decode"))

    @property
    def is_remote(self) -> bool:
        return bool(self.kv and self.kv.get("do_remote_prefill"))


@dataclass(slots=True)
class Run:
    """A prompt whose KV cache is there. `digest` says what will be answered."""

    prompt: Prompt
    digest: bytes
    cached_tokens: int  # as usage tells it
    created_tokens: int
    was_pulled: bool
    block_ids: list[int] = field(default_factory=list)
    kv: dict[str, Any] | None = None  # the hand-off, after `Engine.finish`


class Engine:
    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.engine_id = str(uuid.uuid4())  # a restarted worker is another engine
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.ledger = Ledger()
        self.running = 0
        self.aborted = 0
        # By x-request-id, or a number where there is none: ends the request, and it is answered.
        self.under_way: dict[str | int, Callable[[], None]] = {}
        self._pulling = 0
        self._side_channel_port = settings.side_channel_port
        self._steps = StepClock(settings.latency)
        self._prefills = PrefillClock(settings.latency)
        self._queue: deque[_Ticket] = deque()
        self._errands: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        metrics.watch(
            running=lambda: self.running,
            waiting=lambda: self.waiting,
            kv_usage=lambda: self.pool.usage,
            fetches={
                "waiting_to_start": lambda: sum(ticket.prompt.is_remote for ticket in self._queue),
                "in_progress": lambda: self._pulling,
                "completed_waiting": lambda: 0,  # a pulled prompt is decoded at once
            },
        )

    @property
    def waiting(self) -> int:
        return sum(ticket.prompt.sequences for ticket in self._queue)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Others can pull from this engine while the block runs."""
        settings = self.settings
        port = settings.side_channel_port
        async with side_channel.serve(settings.host, port, self._pulled_by, self._notified) as bound:
            self._side_channel_port = bound
            yield
            await self._finish_errands()
        if self._expiry is not None:
            self._expiry.cancel()

    @asynccontextmanager
    async def run(self, prompt: Prompt, plan: Plan) -> AsyncIterator[Run]:
        """A prompt's life from the queue to its end. Raises `KvLost` if its hand-off fails.

        Leaving early gives everything back, a hand-off that was not pulled included.
        """
        hashes = hash_blocks(prompt.tokens, self.settings.block_size, prompt.salt)
        async with self._claim(prompt) as claim:
            allocation = await self._admit(prompt, hashes if prompt.reads_cache else [], claim)
            run = Run(prompt, b"", 0, 0, was_pulled=False, block_ids=allocation.block_ids)
            try:
                await self._fill(run, claim, allocation, plan)
                self.pool.commit(allocation, hashes)
                yield run
            finally:
                self._leave(run)

    async def wait_token(self, run: Run, plan: Plan, *, is_first: bool) -> None:
        """The next step of a run. A prompt that was computed here brings its first token."""
        if not is_first or run.was_pulled:
            await self._steps.wait_step(self.running, plan.slow_factor)

    def finish(self, run: Run, plan: Plan) -> None:
        """All of the run's answers are complete: its KV cache is pinned if a decode worker is to pull it."""
        if run.prompt.is_pinned_after:
            run.kv = self._pin(run, plan)

    def give_up(self, kv: dict[str, Any] | None) -> None:
        """A request that is refused gives up its hand-off."""
        if kv and kv.get("do_remote_prefill"):
            self._release_soon(kv)

    # --- before the first token

    @asynccontextmanager
    async def _claim(self, prompt: Prompt) -> AsyncIterator[_Claim]:
        claim = _Claim(prompt.kv if prompt.is_remote else None)
        try:
            yield claim
        finally:
            if claim.is_open:
                self._release_soon(claim.params)

    async def _admit(self, prompt: Prompt, hashes: list[bytes], claim: _Claim) -> Allocation:
        ticket = _Ticket(prompt, hashes, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        self._admit_more()
        try:
            while not ticket.admitted.done():
                await asyncio.wait((ticket.admitted,), timeout=self.settings.lease_s / _HEARTBEATS_PER_LEASE)
                if not ticket.admitted.done():
                    self._keep_alive(claim)
            return ticket.admitted.result()
        except asyncio.CancelledError:
            self._withdraw(ticket)
            raise

    def _keep_alive(self, claim: _Claim) -> None:
        """A hand-off that waits in the queue is still wanted."""
        if claim.params is not None:
            self._errand(self._notify(claim.params, "extend"))

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

    def _withdraw(self, ticket: _Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._admit_more()
        else:
            self._give_back(ticket.prompt, ticket.admitted.result().block_ids)

    async def _fill(self, run: Run, claim: _Claim, allocation: Allocation, plan: Plan) -> None:
        if plan.slow_s:
            await asyncio.sleep(plan.slow_s)
        if not (claim.params and run.prompt.reads_cache and await self._pull(run, claim, plan)):
            await self._compute(run, allocation, plan)
        forwarded = (claim.params or {}).get("remote_prefill_cached_tokens")
        if isinstance(forwarded, int):
            run.cached_tokens = forwarded
        self.metrics.prompt_tokens.inc(len(run.prompt.tokens))

    async def _pull(self, run: Run, claim: _Claim, plan: Plan) -> bool:
        """False if the hand-off failed and the prompt is to be computed here. Raises `KvLost`."""
        started = asyncio.get_running_loop().time()
        tokens = len(run.prompt.tokens)
        self.metrics.external_queries.inc(tokens)
        self._pulling += 1
        try:
            run.digest = await claim.pull(is_lost=plan.kv_lost)
            await asyncio.sleep(self.settings.latency.transfer_s(tokens) * plan.slow_factor)
        except KvLost:
            self.metrics.failed_transfers.inc()
            if self.settings.load_failure_policy == "fail":
                raise
            return False
        finally:
            self._pulling -= 1
        run.was_pulled, run.cached_tokens = True, tokens
        self.metrics.external_hits.inc(tokens)
        self.metrics.transfer_seconds.observe(asyncio.get_running_loop().time() - started)
        return True

    async def _compute(self, run: Run, allocation: Allocation, plan: Plan) -> None:
        block_size, tokens = self.settings.block_size, len(run.prompt.tokens)
        run.cached_tokens = allocation.cached_blocks * block_size
        run.created_tokens = tokens // block_size * block_size - run.cached_tokens
        self.metrics.prefix_queries.inc(tokens)
        self.metrics.prefix_hits.inc(run.cached_tokens)
        await self._prefills.compute(tokens - run.cached_tokens, plan.slow_factor)
        run.digest = text.digest_of(run.prompt.tokens)

    # --- after the last token

    def _leave(self, run: Run) -> None:
        self._give_back(run.prompt, run.block_ids)

    def _give_back(self, prompt: Prompt, block_ids: list[int]) -> None:
        self.running -= prompt.sequences
        self.pool.free(block_ids)
        self._admit_more()

    def _pin(self, run: Run, plan: Plan) -> dict[str, Any]:
        """Pin the run's blocks. Of several answers each has a pin, as in vLLM, and the last one is told."""
        ids = _pin_ids(run.prompt)
        block_ids, run.block_ids = run.block_ids, []
        deadline = asyncio.get_running_loop().time() + self.settings.lease_s
        for request_id in ids:
            blocks = block_ids if request_id == ids[-1] else []
            pin = Pin(request_id, blocks, run.digest, len(run.prompt.tokens), deadline)
            self.ledger.pin(pin, is_lost=plan.kv_lost)
        self._watch_leases()
        return self._handoff(ids[-1], block_ids, run)

    def _handoff(self, request_id: str, block_ids: list[int], run: Run) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [block_ids],
            "remote_engine_id": self.engine_id,
            "remote_request_id": request_id,
            "remote_host": self.settings.host,
            "remote_port": self._side_channel_port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(run.prompt.tokens),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": run.cached_tokens,
        }

    # --- leases

    def _watch_leases(self) -> None:
        deadline = self.ledger.next_deadline()
        if deadline is not None and self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        for pin in self.ledger.expire(asyncio.get_running_loop().time()):
            self.metrics.kv_expired.inc()
            self.pool.free(pin.block_ids)
        self._admit_more()
        self._watch_leases()

    def _pulled_by(self, engine_id: str, request_id: str, block_ids: list[int]) -> bytes | None:
        if engine_id != self.engine_id:
            return None
        pin = self.ledger.pull(request_id, block_ids)
        if pin is None:
            self.metrics.late_notifications.inc()
            return None
        self._free_pin(pin)
        return pin.digest

    def _notified(self, op: side_channel.Notice, engine_id: str, request_id: str) -> None:
        if engine_id != self.engine_id:
            return
        if op == "extend":
            self.ledger.extend(request_id, asyncio.get_running_loop().time() + self.settings.lease_s)
        elif pin := self.ledger.release(request_id):
            self._free_pin(pin)

    def _free_pin(self, pin: Pin) -> None:
        self.pool.free(pin.block_ids)
        self._admit_more()

    def _release_soon(self, params: dict[str, Any] | None) -> None:
        self._errand(self._notify(params or {}, "release"))

    async def _notify(self, params: dict[str, Any], op: side_channel.Notice) -> None:
        try:
            await Remote.from_params(params).notify(op)
        except KvLost:
            self.metrics.failed_notifications.inc()

    async def _finish_errands(self) -> None:
        if self._errands:
            await asyncio.wait(self._errands, timeout=_LAST_ERRANDS_S)

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs on when the request is gone."""
        task = asyncio.get_running_loop().create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)


@dataclass(slots=True, eq=False)
class _Ticket:
    """A place in the queue."""

    prompt: Prompt
    hashes: list[bytes]
    admitted: asyncio.Future[Allocation]


class _Claim:
    """A request's hand-off until it is pulled. An open one must be released."""

    def __init__(self, params: dict[str, Any] | None) -> None:
        self.params = params
        self.is_open = params is not None

    async def pull(self, *, is_lost: bool) -> bytes:
        """The digest. Raises `KvLost`, and stays open then."""
        remote = Remote.from_params(self.params or {})
        if is_lost:
            raise KvLost("injected fault")
        digest = await remote.pull()
        self.is_open = False
        return digest


def _pin_ids(prompt: Prompt) -> list[str]:
    if prompt.sequences == 1:
        return [prompt.request_id]
    return [f"{index}_{prompt.request_id}" for index in range(prompt.sequences)]
