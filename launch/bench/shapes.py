"""What requests look like, as plain data: shapes, and the workloads that are made of them.

`baton --help` imports this: tuples, because the import of dataclasses alone takes 10 ms.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A conversation. Lengths are in tokens; each one varies by up to `spread`, as a share.

    The prompt of turn t is the shared system prompt, then `messages + 2 * t` messages, the last one the
    user's. Turns of one conversation share their beginning, conversations share the system prompt alone.
    """

    message: int
    answer: int
    shared: int = 0  # system prompt, the same in every conversation
    messages: int = 1  # in the first turn's prompt; odd, for the user has the first and the last word
    turns: int = 1
    spread: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        messages = self.messages + 2 * (self.turns - 1)
        return self.shared + int((messages * self.message + self.answer) * (1 + self.spread))


class Workload(NamedTuple):
    """Requests of these shapes in turn. `rate_share` scales the user's rate: long prompts come less often."""

    name: str
    about: str
    shapes: tuple[Shape, ...]
    rate_share: float = 1.0

    @property
    def longest(self) -> int:
        return max(shape.longest for shape in self.shapes)


_CHAT = Shape(message=256, answer=128, spread=0.5)
_LONG_PROMPT = Shape(message=8_000, answer=128)
_MULTI_TURN = Shape(shared=1_000, message=150, answer=128, turns=6, spread=0.5)
_AGENTIC = Shape(shared=3_000, messages=37, message=1_000, answer=128)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", "one question of about 256 tokens, 128 tokens answered", (_CHAT,)),
        Workload("long-prompt", "one question of 8,000 tokens, 128 answered", (_LONG_PROMPT,), 0.25),
        Workload("multi-turn", "six turns behind a shared system prompt of 1,000 tokens", (_MULTI_TURN,)),
        Workload("agentic", "40,000 tokens in 38 messages, 128 answered", (_AGENTIC,), 0.1),
        Workload("mixed", "seven chats to one agentic prompt", (*[_CHAT] * 7, _AGENTIC)),
    )
}
