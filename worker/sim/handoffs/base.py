"""This is the seam between the engine and the kinds of hand-off: how a KV cache gets from one engine to
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from worker.sim.faults import Plan
from worker.sim.runs import Prompt, Run


class KvLost(Exception):
    """The KV cache of a hand-off cannot be had."""

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "replace").decode())  # it may quote lone surrogates


class Source(ABC):
    """The KV cache of a decode leg comes from here, from the leg's arrival to its end."""

    # Set by the engine while the leg waits in its queue: to be called once, if there is nothing to wait for.
    on_lost: Callable[[KvLost], None] | None = None

    @abstractmethod
    async def receive(self, tokens: int, plan: Plan) -> bytes:
        """Return the digest, after the time that a transfer of so many tokens takes: the leg has blocks.

        Raises `KvLost`.
        """

    @abstractmethod
    def close(self) -> None:
        """End the leg: what it has not received is given up. It may be called again."""

    def keep_alive(self) -> None:  # noqa: B027  # not every kind has something to do
        """Keep the hand-off, for the leg still waits in the queue; the engine calls this several times per
        lease.
        """


class Kind(ABC):
    """An engine does this for one kind of hand-off, in a prefill leg and in a decode leg."""

    sends = False  # whether `send` is to be called: nothing is answered before it has returned

    # --- a prefill leg, in this order

    def expecting(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Hold it from the leg's arrival to its end. Raises `KvLost` if the leg cannot begin."""
        return nullcontext()

    async def send(self, run: Run, plan: Plan) -> None:  # noqa: B027
        """Send a prompt that is computed; somebody else has the run's seat. Raises `KvLost`."""

    def finish(self, run: Run, plan: Plan) -> dict[str, Any] | None:
        """Note that all answers are complete. The value is the answer's `kv_transfer_params`."""
        return None

    # --- a decode leg

    @abstractmethod
    def source(self, prompt: Prompt) -> Source | None:
        """Return the source, which the caller closes; None if the leg has no use for the KV cache."""

    def refuse(self, params: dict[str, Any]) -> None:  # noqa: B027
        """Note that a decode leg with these `kv_transfer_params` was refused."""

    # ---

    async def stop(self) -> None:  # noqa: B027
        """Stop with the engine, whose requests have ended."""
