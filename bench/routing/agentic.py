"""Sessions of coding agents, drawn from the parameters that NVIDIA's aiperf publishes of its own.

All share 32,000 tokens (system prompt and tools), each of 100 groups 10,000 more (a repository). A session
goes on a pause after each answer, with what that added; so the load is a closed loop.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final

from launch.simulate.trace import Arrival, Trace

BLOCK_TOKENS: Final = 512
SHARED: Final = 32_000
OF_GROUP: Final = 10_000
GROUPS: Final = 100
LONGEST: Final = 200_000
SHARED_BLOCKS: Final = SHARED // BLOCK_TOKENS
GROUP_BLOCKS: Final = (SHARED + OF_GROUP) // BLOCK_TOKENS


def agentic(sessions: int, rate: float, seed: int) -> Trace:
    """Return a trace in which `rate` sessions begin per second."""
    random = Random(f"agentic {seed}")  # no secret
    weights = [1 / (group + 1) ** 0.6 for group in range(GROUPS)]
    firsts: list[Arrival] = []
    at_s, count = 0.0, 0
    for session in range(sessions):
        at_s += random.expovariate(rate)
        (group,) = random.choices(range(GROUPS), weights)
        turns = _turns(random, session, group, count)
        count += len(turns)
        turns[0].at_s = at_s
        firsts.append(turns[0])
    return Trace(firsts, BLOCK_TOKENS)


def _turns(random: Random, session: int, group: int, count: int) -> list[Arrival]:
    turns: list[Arrival] = []
    tokens = SHARED + OF_GROUP + _length(random, 15_000, 5_000, 50_000)
    while True:
        answer = max(1, _length(random, 1_000, 800, 10_000))
        names = _names(tokens // BLOCK_TOKENS, session, group)
        turn = Arrival(count + len(turns), 0.0, tokens, answer, names, session=session)
        if turns:
            turns[-1].after, turns[-1].pause_s = turn, _pause_s(random)
        turns.append(turn)
        longer = tokens + answer + _length(random, 6_000, 4_000, 50_000)
        if longer > LONGEST or random.random() < 0.05 * (1 + 1.5 * tokens / LONGEST):
            return turns
        tokens = longer


def _names(blocks: int, session: int, group: int) -> tuple[int, ...]:
    group_name, session_name = 10_000 + group * 100, 10_000_000 + session * 1_000
    return tuple(
        block if block < SHARED_BLOCKS else (group_name if block < GROUP_BLOCKS else session_name) + block
        for block in range(blocks)
    )


def _pause_s(random: Random) -> float:
    """Return how long a tool runs, or at times a person thinks."""
    if random.random() < 0.7:
        return _length(random, 5_000, 2_000, None) / 1e3
    return _length(random, 30_000, 15_000, None) / 1e3


def _length(random: Random, mean: float, median: float, most: int | None) -> int:
    """Draw from the lognormal distribution with this mean and median."""
    drawn = median * math.exp(math.sqrt(2 * math.log(mean / median)) * random.gauss(0, 1))
    return int(drawn if most is None else min(drawn, most))
