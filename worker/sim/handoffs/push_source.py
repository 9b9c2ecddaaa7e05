"""The decode worker's side of a push is a line to the prefill worker from the leg's arrival on."""

from __future__ import annotations

import asyncio

from worker.sim import side_channel
from worker.sim.faults import Plan
from worker.sim.handoffs.base import KvLost, Source
from worker.sim.settings import Settings
from worker.sim.side_channel import BROKEN, Line, PushAsk


class PushSource(Source):
    """A prefill worker is given up if it does not say for a lease that the prefill leg is there."""

    def __init__(self, host: str, port: int, transfer_id: str, settings: Settings) -> None:
        self._place = host, port
        self._transfer_id = transfer_id
        self._settings = settings
        self._is_ready = False
        self._line: Line | None = None
        self._arrival = asyncio.get_running_loop().create_task(self._arrive())
        self._arrival.add_done_callback(self._tell_loss)

    async def receive(self, tokens: int, plan: Plan) -> bytes:
        if plan.kv_lost:
            self.close()
            raise KvLost("injected fault")
        self._is_ready = True
        self._ask()
        return await self._arrival

    def close(self) -> None:
        self._arrival.cancel()

    async def _arrive(self) -> bytes:
        try:
            async with side_channel.connect(*self._place) as self._line:
                beats = asyncio.get_running_loop().create_task(self._beat())
                try:
                    return await self._listen(self._line)
                finally:
                    beats.cancel()
        except BROKEN as error:
            host, port = self._place
            raise KvLost(f"{self._transfer_id} did not come from {host}:{port}") from error

    async def _beat(self) -> None:
        while True:
            self._ask()
            await asyncio.sleep(self._settings.heartbeat_s)

    def _ask(self) -> None:
        if self._line is not None:
            self._line.tell(PushAsk(self._transfer_id, self._is_ready))

    async def _listen(self, line: Line) -> bytes:
        """Listen to the prefill worker. Raises `KvLost`, or one of `BROKEN`."""
        is_pending = True
        while is_pending:
            async with asyncio.timeout(self._settings.lease_s):
                reply = await line.read_reply()
            is_pending = reply.is_pending
        if reply.digest is None:
            raise KvLost(f"{self._transfer_id} is lost")
        return reply.digest

    def _tell_loss(self, arrival: asyncio.Task[bytes]) -> None:
        error = None if arrival.cancelled() else arrival.exception()
        if isinstance(error, KvLost) and self.on_lost is not None:
            self.on_lost(error)
