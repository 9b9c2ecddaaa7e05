"""An engine stands still though its server answers probes; a request ends the workers that it comes to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

from bench.chaos.client import End, Load, Result, fetch, questions
from bench.chaos.kills import TOKENS, Scale, explain, given_back, load_of
from bench.chaos.report import none_failed, tally
from bench.chaos.site import Orchestrator, Pools, Worker, orchestrating
from bench.shared.processes import Failed
from bench.shared.verdict import Verdict
from orchestrator.legs.retry import MOST_LOST
from worker.sim.questions import Question

FREEZE_S = 8.0
WARM = 100  # requests, so that the pace of the workers is known
STALLED = 'baton_handoffs_given_up_total{reason="stalled"}'
POISON = "a request that kills"


async def freeze(pools: Pools, scale: Scale) -> list[Verdict]:
    """The engine of one decode worker stands still under load."""
    async with orchestrating(pools) as orchestrator:
        async with load_of(orchestrator, scale) as load:
            await load.reach(min(WARM, scale.requests // 2))
            await pools.decode[0].add_faults({"kind": "freeze", "seconds": FREEZE_S})
        explain(load.results)
        moved = await _moved(orchestrator)
        return [
            none_failed(load.results, f"one of 4 decode engines stands still for {FREEZE_S:g} s"),
            Verdict("hand-offs that stall there are tried elsewhere", f"{moved:.0f} were", moved > 0),
            await given_back(orchestrator),
        ]


async def poison(pools: Pools, scale: Scale) -> list[Verdict]:
    """One request under load kills each worker that gets it."""
    for worker in pools.workers:
        await worker.add_faults({"kind": "die", "contains": POISON})
    async with orchestrating(pools) as orchestrator:
        async with Load(orchestrator.port, _others(scale), scale.clients) as load:
            await load.reach(scale.requests // 4)
            status, code = await _ask_poison(orchestrator)
        explain(load.results)
        dead = [worker for worker in pools.workers if not await _is_alive(worker)]
        for worker in dead:
            await worker.restart()
        await orchestrator.wait_ready(1, len(pools.workers))
        is_nothing_left = await given_back(orchestrator)
    for worker in pools.workers:
        await worker.clear_faults()
    return [_killed(len(dead), status, code), _others_go_on(load.results), is_nothing_left]


def _others(scale: Scale) -> Iterator[Question]:
    return islice(questions(Random(scale.seed), TOKENS), scale.requests)


async def _ask_poison(orchestrator: Orchestrator) -> tuple[int, str]:
    (question,) = islice(questions(Random(0), TOKENS), 1)
    body = question.body | {"messages": [{"role": "user", "content": POISON}]}
    answer = await fetch(orchestrator.port, question.path, json.dumps(body).encode())
    return answer.status, str(json.loads(answer.body).get("error", {}).get("code"))


async def _is_alive(worker: Worker) -> bool:
    try:
        return (await fetch(worker.port, "/health")).status == 200
    except Failed:
        return False


async def _moved(orchestrator: Orchestrator) -> float:
    lines = (await orchestrator.metrics_page()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(STALLED))


def _killed(dead: int, status: int, code: str) -> Verdict:
    goal = f"a request kills whoever gets it: {MOST_LOST} workers at most, and its answer is 502"
    is_told = (status, code) == (502, "poison")
    return Verdict(goal, f"{dead} workers; {status} {code}", 0 < dead <= MOST_LOST and is_told)


def _others_go_on(results: Sequence[Result]) -> Verdict:
    """Who shares both workers with it is lost as it is, and cannot be told from it."""
    failed = [result for result in results if result.has_failed]
    is_innocent = [result.end is End.ERROR and '"poison"' in result.why for result in failed]
    return Verdict("no other fails, but those that were lost with both", tally(results), all(is_innocent))
