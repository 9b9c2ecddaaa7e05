"""The reading half of a leg in memory; apart from the rest, for it extends what can be compiled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from orchestrator.transport.answer import Answer

if TYPE_CHECKING:
    from orchestrator.transport.memory import MemoryReply


class MemoryAnswer(Answer):
    """What a `MemoryReply` says, as its reader has it."""

    __slots__ = ("_reply",)

    def __init__(self, reply: MemoryReply) -> None:
        super().__init__(asyncio.get_running_loop())
        self._reply = reply

    def _pause_reading(self) -> None:
        self._reply.hold()

    def _resume_reading(self) -> None:
        self._reply.let_go()

    def _close_sending(self) -> None:
        self._reply.leave()

    def _drop(self) -> None:
        self._reply.drop()
