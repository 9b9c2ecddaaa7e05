"""`python -m tests.simulation.streams SEED` replays a seed: what happened, and what is wrong with it."""

from __future__ import annotations

import sys

from tests.simulation.streams.invariants import check
from tests.simulation.streams.simulate import simulate


def main(seed: int) -> int:
    result = simulate(seed)
    print(result.schedule, *result.schedule.requests, sep="\n")
    print(*result.trace, sep="\n")
    problems = check(result)
    print(*(f"WRONG: {problem}" for problem in problems), sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
