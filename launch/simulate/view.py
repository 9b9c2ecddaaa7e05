"""Policies see a simulated request as they see a client's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from launch.simulate.trace import BYTES_PER_TOKEN, Arrival, prompt_bytes
from orchestrator.routing.policies.base import Request

SESSION: Final = b"x-session-id"


class SimulatedRequest(Request):
    """It reads as the bytes that stand for its prompt; the only header that it has names its session."""

    def __init__(self, model: str, arrival: Arrival, block_tokens: int) -> None:
        self.model = model
        self.arrival = arrival
        self.block_tokens = block_tokens

    def body_bytes(self) -> int:
        return self.arrival.prompt_tokens * BYTES_PER_TOKEN

    def prompt_tokens(self) -> int:
        return self.arrival.prompt_tokens

    def prompt(self, most: int) -> bytes:
        return prompt_bytes(self.arrival, self.block_tokens, most)

    def prompt_ids(self) -> Sequence[int] | None:
        return None

    def field(self, name: str) -> memoryview | None:
        return None

    def header(self, name: bytes) -> bytes | None:
        if name != SESSION or self.arrival.session is None:
            return None
        return b"%d" % self.arrival.session
