"""What a request asks of the policy `prefix`, and how much of its prompt is known where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from orchestrator.routing.policies.base import Request
from orchestrator.routing.policies.prefix_index import FINE, MOST_BYTES, hashed
from orchestrator.routing.policies.prefix_legs import TOKEN_S, Load

BYTES_PER_TOKEN: Final = 4
LEAST_TOKENS: Final = FINE // BYTES_PER_TOKEN  # of a prompt with a whole step


class Levels:
    """So much of a prompt is known, run by run, and by whom."""

    __slots__ = ("holders", "spared", "spared_s", "tokens")

    def __init__(self) -> None:
        self.holders: list[int] = []  # of each run
        self.tokens: list[float] = []  # of the prompt, up to the end of each run
        self.spared: list[float] = []  # seconds, up to there, that are no cost but an investment
        self.spared_s = 0.0  # of all

    def add(self, holders: int, tokens: float, new_tokens: float, fan_out: float) -> None:
        """`new_tokens` of a run with this share of fan-out cost 1 / (1 + `fan_out`)."""
        self.spared_s += TOKEN_S * new_tokens * fan_out / (1.0 + fan_out)
        self.holders.append(holders)
        self.tokens.append(tokens)
        self.spared.append(self.spared_s)


class Asked:
    """A request was asked about its prompt."""

    __slots__ = ("candidates", "hashes", "per_byte", "salt", "tokens")

    def __init__(self, request: Request, candidates: Sequence[Any], seed: int, salt: bytes) -> None:
        """`seed` tells prompts apart that share no cache, `salt` those with equal tokens."""
        self.salt = salt
        self.candidates = candidates
        self.tokens = tokens = float(request.prompt_tokens())
        self.hashes = b""
        self.per_byte = 1 / BYTES_PER_TOKEN
        if tokens >= LEAST_TOKENS:
            prompt = request.prompt(MOST_BYTES)
            self.hashes = hashed(prompt, seed)
            if 0 < len(prompt) < MOST_BYTES:
                self.per_byte = tokens / len(prompt)


def level_of(levels: Levels, load: Load) -> int:
    """Return up to which level a worker has the prompt; -1 if it has nothing of it."""
    level = len(levels.holders) - 1
    while level >= 0 and not levels.holders[level] & load.holder.bit:
        level -= 1
    return level
