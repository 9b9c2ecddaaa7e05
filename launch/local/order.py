"""Orders say how an operator wants something done, and who is told how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launch.local.control import Caller, CommandFailed


@dataclass(frozen=True, slots=True)
class Order:
    """This is how an operator wants something done."""

    caller: Caller
    timeout_s: float  # for the requests of a worker to end
    is_forced: bool  # requests may fail


class Nobody(Caller):
    """Nobody waits for what is done unasked: the run's own output tells of it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.is_gone = False
        self._say = say

    def say(self, text: str) -> None:
        self._say(text)


def check_wanted(order: Order) -> None:
    if order.caller.is_gone:
        raise CommandFailed("given up")
