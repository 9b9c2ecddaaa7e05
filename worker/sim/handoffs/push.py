"""In a push both legs are sent at once, and name the transfer by an id that their sender made.

The decode worker connects to the prefill worker as soon as its leg arrives. The KV cache goes over when the
prompt is computed and the decode leg has blocks. The prefill leg is answered after that, and owes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from worker.sim.faults import Plan
from worker.sim.handoffs.base import Kind, KvLost, Source
from worker.sim.handoffs.leases import Leases
from worker.sim.handoffs.push_source import PushSource
from worker.sim.handoffs.transfers import Side, Transfer, Transfers
from worker.sim.ledger import Pin
from worker.sim.runs import Prompt, Run
from worker.sim.settings import Settings
from worker.sim.side_channel import Ask, Line, PushAsk, Reply


class BadPush(ValueError):
    """The `kv_transfer_params` of a push cannot be used. The text says why."""


class _Leg(msgspec.Struct, kw_only=True):
    """These are the `kv_transfer_params` of either leg."""

    transfer_id: Annotated[str, Meta(pattern=r"^[!-~]{1,256}\Z")]  # visible ASCII
    do_remote_decode: bool = False
    do_remote_prefill: bool = False


class _DecodeLeg(_Leg, kw_only=True):
    remote_host: Annotated[str, Meta(min_length=1)]
    remote_port: Annotated[int, Meta(ge=1, le=65535)]


def is_push(params: dict[str, Any] | None) -> bool:
    return params is not None and params.get("transfer_mode") == "push"


def check(params: dict[str, Any], prompts: int) -> None:
    """Raise `BadPush` if a leg with these `kv_transfer_params` and so many prompts cannot take part."""
    try:
        leg = msgspec.convert(params, _DecodeLeg if params.get("do_remote_prefill") else _Leg)
    except msgspec.ValidationError as error:
        raise BadPush(str(error)) from error
    if leg.do_remote_decode == leg.do_remote_prefill:
        raise BadPush("A push needs either `do_remote_decode` or `do_remote_prefill`")
    if prompts != 1:
        raise BadPush(f"A transfer is of one prompt, got {prompts}")


class Push(Kind):
    sends = True

    def __init__(self, settings: Settings, leases: Leases) -> None:
        self._settings = settings
        self._leases = leases
        self._transfers = Transfers()

    # --- a prefill leg

    @contextmanager
    def expecting(self, prompt: Prompt) -> Iterator[None]:
        transfer = self._transfers.begin(_id_of(prompt), prompt.request_id)
        try:
            yield
        finally:
            self._leases.release(prompt.request_id)
            self._transfers.end(transfer)

    async def send(self, run: Run, plan: Plan) -> None:
        """Wait for the decode side, at most until the lease is over, and give it the KV cache."""
        transfer = self._transfers.under_way(_id_of(run.prompt))
        self._pin(run, transfer)
        while not await self._is_sent(transfer, run, plan):
            pass  # the decode side left in the middle; another one may come
        self._leases.push(run.prompt.request_id)

    def _pin(self, run: Run, transfer: Transfer) -> None:
        block_ids, run.block_ids = run.block_ids, []
        request_id, tokens = run.prompt.request_id, len(run.prompt.tokens)
        deadline = self._leases.next_end()
        self._leases.pin(Pin(request_id, block_ids, run.digest, tokens, deadline, transfer.expire))

    async def _is_sent(self, transfer: Transfer, run: Run, plan: Plan) -> bool:
        side = await transfer.wait_side()
        if plan.kv_lost:
            raise KvLost("injected fault")
        tokens = len(run.prompt.tokens)
        await asyncio.sleep(self._settings.latency.transfer_s(tokens) * plan.slow_factor)
        return not transfer.is_expired and self._transfers.deliver(transfer, side, run.digest)

    async def answer(self, ask: PushAsk, line: Line) -> None:
        """Serve a decode side, which is there until its line breaks. The caller closes the line."""
        side = Side(line)
        try:
            transfer = self._transfers.join(ask.transfer_id, side)
        except KvLost:
            self._leases.refuse()
            return line.tell(Reply())
        try:
            await self._listen(ask, line, transfer, side)
        finally:
            self._transfers.leave(transfer, side)

    async def _listen(self, ask: Ask, line: Line, transfer: Transfer, side: Side) -> None:
        """Listen to a side; one without blocks does not keep the lease: who has them may wait for those of
        the lease.
        """
        while isinstance(ask, PushAsk):
            transfer.hear(side, is_ready=ask.is_ready)
            if ask.is_ready and transfer.request_id is not None:
                self._leases.extend(transfer.request_id)
            ask = await line.read_ask()

    # --- a decode leg

    def source(self, prompt: Prompt) -> Source | None:
        if not prompt.reads_cache:
            return None
        leg = msgspec.convert(prompt.kv, _DecodeLeg)
        return PushSource(leg.remote_host, leg.remote_port, leg.transfer_id, self._settings)


def _id_of(prompt: Prompt) -> str:
    return msgspec.convert(prompt.kv, _Leg).transfer_id
