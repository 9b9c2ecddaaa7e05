"""A source knows which workers there are, and tells the whole set of them whenever it has changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random
from typing import NoReturn, Protocol

from orchestrator.config.options import DiscoverConfig
from orchestrator.wire.info import Role
from orchestrator.wire.member import MemberSet

PoolKey = tuple[str, Role]  # the model and the role of a pool
Take = Callable[[MemberSet], None]


class SourceAway(Exception):
    """The source cannot be asked now; the message says why and, where that is known, what to do."""

    def __init__(self, why: str, retry_after_s: float = 0.0) -> None:
        """`retry_after_s` is how long the source wants to be left alone."""
        super().__init__(why)
        self.retry_after_s = retry_after_s


class Source(ABC):
    """A source is made for one or several pools, and watches until it is cancelled."""

    @abstractmethod
    async def watch(self, take: Take) -> NoReturn:
        """Call `take` with all members that there are, at once and whenever they have changed, and now and
        then also when they have not, so that it can be seen how old the last set is.

        `take` is called in the event loop, in the same turn in which a change is read. Raises `SourceAway`
        when the source cannot be asked; whoever called then calls again after a pause.
        """


class MakeSource(Protocol):
    """Makes a source of its part of the config."""

    def __call__(self, config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
        """`pools` are those whose workers it finds; `random` makes the jitter of pauses."""
        ...
