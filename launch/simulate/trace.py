"""A trace says when requests came, how long they and their answers were, and which prompts begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

BYTES_PER_TOKEN: Final = 4  # as the orchestrator estimates it


class Arrival:
    """A request comes, of so many tokens, and is answered with so many."""

    __slots__ = (
        "after",
        "at_s",
        "blocks",
        "index",
        "output_tokens",
        "pause_s",
        "prompt_tokens",
        "session",
        "tail",
    )

    def __init__(
        self,
        index: int,
        at_s: float,
        prompt_tokens: int,
        output_tokens: int,
        blocks: Sequence[int] = (),
        *,
        tail: int | None = None,
        session: int | None = None,
    ) -> None:
        """`blocks` name the whole blocks of the prompt: equal names are equal text, whatever came before.
        `tail` names what is left behind them; nothing has it in common if it is None.
        """
        self.index = index
        self.at_s = at_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.blocks = blocks
        self.tail = tail
        self.session = session
        self.after: Arrival | None = None  # it comes when this one has been answered
        self.pause_s = 0.0  # so much later


class Trace:
    """`arrivals` are in the order of their moments, in seconds from the first; those that come after others
    are not among them.
    """

    def __init__(self, arrivals: list[Arrival], block_tokens: int, resolution_s: float = 0.0) -> None:
        """A block has so many tokens. The trace tells moments apart that differ by `resolution_s`."""
        self.arrivals = arrivals
        self.block_tokens = block_tokens
        self.resolution_s = resolution_s

    def moments(self, rate: float, random: Random) -> list[tuple[float, Arrival]]:
        """Return when each request comes if all come `rate` times as fast, in order. Moments that the trace
        does not tell apart are drawn.
        """
        spread = self.resolution_s
        found = [(arrival.at_s + random.random() * spread, arrival) for arrival in self.arrivals]
        found.sort(key=_moment)
        first = found[0][0]
        return [((at_s - first) / rate, arrival) for at_s, arrival in found]


def _moment(entry: tuple[float, Arrival]) -> float:
    return entry[0]


def prompt_bytes(arrival: Arrival, block_tokens: int, most: int) -> bytes:
    """Return the first `most` bytes of a text that stands for the prompt."""
    times = block_tokens * BYTES_PER_TOKEN // 8
    text = b"".join([block.to_bytes(8, "little") * times for block in arrival.blocks])
    left = arrival.prompt_tokens * BYTES_PER_TOKEN - len(text)
    if left > 0:
        # No block has such a name: what is left differs from all blocks.
        tail = ~arrival.index if arrival.tail is None else arrival.tail
        text += (tail.to_bytes(8, "little", signed=tail < 0) * (left // 8 + 1))[:left]
    return text if len(text) <= most else text[:most]
