"""This is the reading half of a leg in memory, in a module of its own: it extends what is compiled."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from orchestrator.compiled import mypyc_attr
from orchestrator.transport.answer import Answer


@mypyc_attr(allow_interpreted_subclasses=True)
class Writer(ABC):
    """This is a worker's end of a leg, which is told what the reader does.

    Its methods do nothing once the leg is over.
    """

    @abstractmethod
    def hold(self) -> None:
        """The reader takes no more for now."""
        ...

    @abstractmethod
    def let_go(self) -> None:
        """The reader takes more again."""
        ...

    @abstractmethod
    def leave(self) -> None:
        """The reader does not want the answer any more; what the worker has said by then still arrives."""
        ...

    @abstractmethod
    def drop(self) -> None:
        """The reader has given the leg up."""
        ...


class MemoryAnswer(Answer):
    """A reader has in this what the worker's end of a leg, its `Writer`, says."""

    __slots__ = ("_reply",)

    def __init__(self, reply: Writer) -> None:
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
