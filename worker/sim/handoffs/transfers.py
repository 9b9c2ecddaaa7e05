"""The two sides of a push meet on the prefill worker: its own leg, and the line of a decode worker.

Either may come first. A transfer's id is good for one use.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from worker.sim.handoffs.base import KvLost
from worker.sim.side_channel import Line, Reply

_REMEMBERED = 65_536  # ids that were used: a decode side comes seconds after its prefill leg, if at all

_PENDING = Reply(is_pending=True)
_LOST = Reply()


class Side:
    """A decode worker asks for a transfer."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.is_ready = False  # it has blocks
        self.is_gone = False

    def tell(self, reply: Reply) -> None:
        if not self.is_gone:
            self._line.tell(reply)


class Transfer:
    """A transfer lasts until it has succeeded or failed, or nobody is there."""

    def __init__(self, transfer_id: str) -> None:
        self.id = transfer_id
        self.request_id: str | None = None  # of the prefill leg, which pins blocks under it
        self.side: Side | None = None
        self.is_expired = False
        self._changed = asyncio.Event()

    async def wait_side(self) -> Side:
        """Return the decode side, once it is ready. Raises `KvLost` when the lease is over."""
        while not self.is_expired:
            if self.side is not None and self.side.is_ready:
                return self.side
            self._changed.clear()
            await self._changed.wait()
        raise KvLost(f"nobody took {self.id} before its lease was over")

    def hear(self, side: Side, *, is_ready: bool) -> None:
        """Note that the decode side is alive; it is told whether there is something to wait for."""
        side.is_ready = is_ready
        self._changed.set()
        if self.request_id is not None:
            side.tell(_PENDING)

    def expire(self) -> None:
        self.is_expired = True
        self._changed.set()


class Transfers:
    """It has all transfers of one prefill worker."""

    def __init__(self) -> None:
        self._open: dict[str, Transfer] = {}
        self._over: OrderedDict[str, None] = OrderedDict()  # the oldest first

    def begin(self, transfer_id: str, request_id: str) -> Transfer:
        """Begin with the prefill leg, which is there. Raises `KvLost` if the id was used before."""
        transfer = self._at(transfer_id)
        if transfer.request_id is not None:
            raise KvLost(f"{transfer_id} has a prefill leg")
        transfer.request_id = request_id
        if transfer.side is not None:
            transfer.side.tell(_PENDING)
        return transfer

    def join(self, transfer_id: str, side: Side) -> Transfer:
        """Let a decode side join. Raises `KvLost` if there is one, or if the transfer has ended."""
        transfer = self._at(transfer_id)
        if transfer.side is not None:
            raise KvLost(f"{transfer_id} has a decode side")
        transfer.side = side
        return transfer

    def leave(self, transfer: Transfer, side: Side) -> None:
        """Note that the decode side has gone; another one may come while the transfer has not ended."""
        side.is_gone = True
        if transfer.side is side:
            transfer.side = None
            if transfer.request_id is None:
                self._forget(transfer)

    def under_way(self, transfer_id: str) -> Transfer:
        return self._open[transfer_id]

    def deliver(self, transfer: Transfer, side: Side, digest: bytes) -> bool:
        """Deliver the KV cache, which ends the transfer; return False if the decode side has gone before."""
        if side.is_gone:
            return False
        side.tell(Reply(digest))
        transfer.side = None
        self.end(transfer)
        return True

    def end(self, transfer: Transfer) -> None:
        """End it: whoever waits for it, or comes later, is told that it is lost. It may be called again."""
        if self._forget(transfer):
            self._over[transfer.id] = None
            if len(self._over) > _REMEMBERED:
                self._over.popitem(last=False)
            if transfer.side is not None:
                transfer.side.tell(_LOST)

    def _at(self, transfer_id: str) -> Transfer:
        if transfer_id in self._over:
            raise KvLost(f"{transfer_id} has ended")
        if transfer_id not in self._open:
            self._open[transfer_id] = Transfer(transfer_id)
        return self._open[transfer_id]

    def _forget(self, transfer: Transfer) -> bool:
        is_known = self._open.get(transfer.id) is transfer
        if is_known:
            del self._open[transfer.id]
        return is_known
