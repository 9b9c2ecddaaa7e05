"""This measures how long requests wait where several orchestrators send to the same workers, by what each of
them knows of the load, in virtual time.

    python -m bench.replicas [--policy least_loaded] [--loads 0.7,0.9] [--orchestrators 1,2,4,8] [--seeds 5]

Sixteen prefill workers take one prompt after the other, of 300 ms in the mean, with a spread of 1.5 times
that. The policy, the counts and what workers report are the real ones. Figures are mean waits in
milliseconds, the mean of all seeds and how far they are from it. Then clients stick to four orchestrators,
55 % of them to one, while 80 % of the seats of the decode workers are taken: how many requests wait beside
free seats? The tables are in `docs/routing.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.replicas.seats import POLICIES, Run, Skewed, done
from bench.replicas.views import VIEWS, Site, View, mean_wait_s
from bench.shared.command import parser, positive, run
from bench.shared.figures import aligned

SEATS = (32, 64, 256)  # of all workers


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--policy", default="least_loaded")
    options.add_argument("--loads", default="0.7,0.9")
    options.add_argument("--orchestrators", default="1,2,4,8")
    options.add_argument("--seeds", type=positive, default=5)
    options.add_argument("--requests", type=positive, default=20_000)
    given = options.parse_args()
    for load in map(float, given.loads.split(",")):
        counts = [int(count) for count in given.orchestrators.split(",")]
        sites = [Site(count, load, requests=given.requests, policy=given.policy) for count in counts]
        lines = [[f"{given.policy} at {load:g}", *(f"{count} orch." for count in counts)]]
        lines += [list(_row(view, sites, given.seeds)) for view in VIEWS]
        print("\n".join(aligned(lines)), end="\n\n")
    print("\n".join(aligned(list(_seats(given.seeds)))))


def _seats(seeds: int) -> Iterator[list[str]]:
    yield ["requests that wait beside free seats", "seats", "4 orchestrators", "4 processes of one"]
    for policy in POLICIES:
        for seats in SEATS:
            sites = [Skewed(policy, is_one, seats=seats // Skewed.workers) for is_one in (False, True)]
            runs = [[done(site, seed) for seed in range(seeds)] for site in sites]
            yield [POLICIES[policy], str(seats), *map(_shares, runs)]


def _shares(runs: Sequence[Run]) -> str:
    waited = max(run.waited / run.came for run in runs)
    over = statistics.fmean(run.over / run.begun for run in runs)
    return f"{waited:.2%} at most; {over:.2%} over the seats"


def _row(view: View, sites: Sequence[Site], seeds: int) -> Iterator[str]:
    yield VIEWS[view]
    for site in sites:
        waits = [1000 * mean_wait_s(site, view, seed) for seed in range(seeds)]
        spread = statistics.stdev(waits) if seeds > 1 else 0.0
        yield f"{statistics.fmean(waits):,.0f} ±{spread:.0f}"


if __name__ == "__main__":
    run("replicas", main)
