"""NIXL pulls: one leg is sent after the other.

The prefill leg pins its blocks, and its answer says where they are. The decode leg brings that along, and its
worker fetches the KV cache or gives it up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from worker.sim import side_channel, text
from worker.sim.faults import Plan
from worker.sim.handoffs.base import Kind, KvLost, Source
from worker.sim.handoffs.leases import Leases
from worker.sim.ledger import Pin
from worker.sim.metrics import Metrics
from worker.sim.pulse import Pulse
from worker.sim.runs import Prompt, Run
from worker.sim.settings import Settings
from worker.sim.side_channel import BROKEN, Extend, Line, PullAsk, PullAsks, Release, Reply

_LAST_ERRANDS_S = 1.0  # when the worker stops


class Remote(msgspec.Struct, frozen=True, rename=lambda name: f"remote_{name}"):
    """The KV cache of a prompt lies here, as a hand-off's `kv_transfer_params` say."""

    host: str
    port: int
    engine_id: str
    request_id: str
    block_ids: list[list[int]]  # per KV cache group

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Remote:
        """Read it. Raises `KvLost` if something is missing or wrong. (vLLM's engine dies of some of that.)"""
        try:
            return msgspec.convert(params, cls, strict=False)
        except msgspec.ValidationError as error:
            raise KvLost("the hand-off is incomplete") from error

    async def pull(self) -> bytes:
        """Return the digest; the prefill worker has let go of it then. Raises `KvLost`."""
        blocks = [block for group in self.block_ids for block in group]
        digest = (await self._ask(PullAsk(self.engine_id, self.request_id, blocks))).digest
        if digest is None:
            raise KvLost(f"{self.request_id} cannot be pulled")
        return digest

    async def notify(self, notice: type[Extend | Release]) -> None:
        """Tell the prefill worker whether somebody will pull. Raises `KvLost` if it cannot be told."""
        await self._ask(notice(self.engine_id, self.request_id))

    async def _ask(self, ask: PullAsks) -> Reply:
        try:
            async with asyncio.timeout(side_channel.CONNECT_S):
                async with side_channel.connect(self.host, self.port) as line:
                    line.tell(ask)
                    return await line.read_reply()
        except BROKEN as error:
            raise KvLost(f"no answer from {self.host}:{self.port}") from error


class Pull(Kind):
    def __init__(
        self, engine_id: str, settings: Settings, metrics: Metrics, leases: Leases, pulse: Pulse
    ) -> None:
        self.port = settings.side_channel_port  # 0 until the engine serves, if any port will do
        self._engine_id = engine_id
        self._settings = settings
        self._metrics = metrics
        self._leases = leases
        self._pulse = pulse
        self._errands: set[asyncio.Task[None]] = set()

    # --- a prefill leg

    def finish(self, run: Run, plan: Plan) -> dict[str, Any]:
        """Pin the run's blocks. Of several answers each has a pin, as in vLLM, and the last one is told."""
        ids = _pin_ids(run.prompt)
        block_ids, run.block_ids = run.block_ids, []
        deadline = self._leases.next_end()
        for request_id in ids:
            blocks = block_ids if request_id == ids[-1] else []
            pin = Pin(request_id, blocks, run.digest, len(run.prompt.tokens), deadline)
            self._leases.pin(pin, is_lost=plan.kv_lost)
        return self._params(ids[-1], block_ids, run)

    def _params(self, request_id: str, block_ids: list[int], run: Run) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [block_ids],
            "remote_engine_id": self._engine_id,
            "remote_request_id": request_id,
            "remote_host": self._settings.advertised_host,
            "remote_port": self._settings.defects.advertised_port or self.port,
            "tp_size": self._settings.announced.tp,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(run.prompt.tokens),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": run.cached_tokens,
        }

    async def answer(self, ask: PullAsks, line: Line) -> None:
        """Answer a decode worker that asks or notifies. The caller closes the line."""
        await self._pulse.wait()
        line.tell(Reply(self._digest_for(ask)))

    def _digest_for(self, ask: PullAsks) -> bytes | None:
        if ask.engine_id != self._engine_id:
            return None
        match ask:
            case PullAsk():
                pin = self._leases.pull(ask.request_id, ask.block_ids)
                return pin.digest if pin else None
            case Extend():
                self._leases.extend(ask.request_id)
            case Release():
                self._leases.release(ask.request_id)
        return None

    # --- a decode leg

    def source(self, prompt: Prompt) -> Source:
        return _Claim(self, prompt.kv or {})

    def refuse(self, params: dict[str, Any]) -> None:
        self.notify_soon(params, Release)

    def notify_soon(self, params: dict[str, Any], notice: type[Extend | Release]) -> None:
        """Notify in a task that runs on when the request is gone."""
        task = asyncio.get_running_loop().create_task(self._notify(params, notice))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def transfer_s(self, tokens: int) -> float:
        return self._settings.latency.transfer_s(tokens)

    async def stop(self) -> None:
        if self._errands:
            await asyncio.wait(self._errands, timeout=_LAST_ERRANDS_S)

    async def _notify(self, params: dict[str, Any], notice: type[Extend | Release]) -> None:
        await self._pulse.wait()
        try:
            await Remote.from_params(params).notify(notice)
        except KvLost:
            self._metrics.failed_notifications.inc()


class _Claim(Source):
    """It is a decode leg's hand-off until it is pulled. An open one is released when it is closed."""

    def __init__(self, kind: Pull, params: dict[str, Any]) -> None:
        self._kind = kind
        self._params = params
        self._is_open = True

    async def receive(self, tokens: int, plan: Plan) -> bytes:
        remote = Remote.from_params(self._params)
        if plan.kv_lost:
            raise KvLost("injected fault")
        digest = await remote.pull()
        self._is_open = False
        await asyncio.sleep(self._kind.transfer_s(tokens) * plan.slow_factor)
        return text.garbled(digest) if plan.kv_garbled else digest

    def keep_alive(self) -> None:
        """Say that a hand-off that waits in the queue is still wanted."""
        self._kind.notify_soon(self._params, Extend)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._kind.notify_soon(self._params, Release)


def _pin_ids(prompt: Prompt) -> list[str]:
    if prompt.sequences == 1:
        return [prompt.request_id]
    return [f"{index}_{prompt.request_id}" for index in range(prompt.sequences)]
