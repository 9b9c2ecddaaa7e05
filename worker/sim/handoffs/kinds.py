"""An engine knows these kinds of hand-off."""

from __future__ import annotations

from typing import Any

from worker.sim.handoffs.base import Kind
from worker.sim.handoffs.leases import Leases
from worker.sim.handoffs.pull import Pull
from worker.sim.handoffs.push import Push, is_push
from worker.sim.metrics import Metrics
from worker.sim.pulse import Pulse
from worker.sim.settings import Settings
from worker.sim.side_channel import Ask, Line, PushAsk


class Handoffs:
    """It has all hand-offs of one engine."""

    def __init__(
        self, engine_id: str, settings: Settings, metrics: Metrics, leases: Leases, pulse: Pulse
    ) -> None:
        self._pull = Pull(engine_id, settings, metrics, leases, pulse)
        self._push = Push(settings, leases)

    def of(self, params: dict[str, Any] | None) -> Kind:
        """Return the kind that a leg's `kv_transfer_params` ask for."""
        return self._push if is_push(params) else self._pull

    async def answer(self, ask: Ask, line: Line) -> None:
        """Answer a decode worker that asks over the side channel. The caller closes the line."""
        if isinstance(ask, PushAsk):
            await self._push.answer(ask, line)
        else:
            await self._pull.answer(ask, line)

    def listens_on(self, port: int) -> None:
        """Note that the side channel has this port."""
        self._pull.port = port

    async def stop(self) -> None:
        """Stop with the engine, whose requests have ended."""
        for kind in (self._pull, self._push):
            await kind.stop()
