"""Clients leave in every phase, streams are cut at any token, and outages cost legs."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from random import Random
from typing import Any

from bench.chaos.client import Load, fetch, questions
from bench.chaos.kills import Scale, explain
from bench.chaos.report import nothing
from bench.chaos.report import tally as counted
from bench.chaos.site import Change, Orchestrator, Pools, Worker, orchestrating
from bench.shared.processes import Failed
from bench.shared.verdict import Verdict
from bench.soak.load import Cancel, Phase, Request, Tally, kinds, run_load
from worker.sim.questions import Outcome, Question, WrongAnswer, events_of, judge

CANCELLED = ("chat", "stream", "completion")  # kinds of a soak that reach the workers
PHASES = {Phase.SENDING: 1.0, Phase.WAITING: 0.1, Phase.READING: 2000.0}  # shares, seconds, bytes
MOST_ASKED = 2  # requests for each cancel: some answers come before their client leaves
GRACE_S = 1.0  # after the last cancel

BATCH = 12  # streams at a time, of which some are cut
EACH = 2  # cuts by one worker in a batch
CUT_TOKENS = 32
CUTS: list[dict[str, Any]] = [
    {"kind": "reset"},
    {"kind": "truncate", "clean": False},
    {"kind": "truncate", "clean": True},
]
MOST_STREAMS = 20  # for each cut that is wanted: who has just lost a leg may be spared for a moment
DONE = "data: [DONE]\n\n"

CROWD = 80  # clients: more than 64 requests are always open
CROWD_TOKENS = 100  # of each answer: half a second at least
REFUSAL = {"kind": "error", "status": 503, "leg": "decode"}
LIMIT = 1.25  # legs sent for each that was needed
LEGS = 2  # that a request needs


# --- cancels ------------------------------------------------------------------------------------


async def cancels(pools: Pools, scale: Scale) -> list[Verdict]:
    """Clients leave while they send, while they wait for either worker, and while they read."""
    await pools.wait_idle()
    tally = Tally()

    def note(found: Tally) -> None:
        nonlocal tally
        tally = found

    async with orchestrating(pools) as orchestrator:
        asked = takewhile(lambda _: tally.cancelled.total() < scale.cancels, cancelled(Random(scale.seed)))
        most = MOST_ASKED * scale.cancels
        await run_load(orchestrator.port, asked, count=most, clients=scale.clients, on_end=note)
        await asyncio.sleep(GRACE_S)
        held = await orchestrator.held()
        held |= await pools.held()
    phases = ", ".join(f"{count:,} {phase}" for phase, count in tally.cancelled.most_common())
    return [
        Verdict("clients that leave", f"{phases}; {tally.answered.total()} too late", None),
        nothing("those who were too late are answered rightly", tally.problems),
        nothing(f"{GRACE_S:.0f} s later nothing is open, no worker is busy, and no block is pinned", held),
    ]


def cancelled(random: Random) -> Iterator[Request]:
    """Yield, without end, requests that are given up at some moment of some phase."""
    of = [kind for kind in kinds() if kind.name in CANCELLED]
    while True:
        yield Request(random.choice(of), False, _cancel(random))


def _cancel(random: Random) -> Cancel:
    phase = random.choice(list(PHASES))
    return Cancel(phase, random.uniform(0, PHASES[phase]), random.random() < 0.5)


# --- cuts ---------------------------------------------------------------------------------------


async def cuts(pools: Pools, scale: Scale) -> list[Verdict]:
    """Decode legs of streams end at random tokens; what clients read is compared with uncut streams."""
    random, asked, struck, different = Random(scale.seed), 0, 0, 0
    streams = (_with_usage(question) for question in questions(random, CUT_TOKENS) if question.is_stream)
    async with orchestrating(pools) as orchestrator:
        while struck < scale.cuts and asked < scale.cuts * MOST_STREAMS:
            batch = list(islice(streams, BATCH))
            uncut = await _answers(orchestrator, batch)
            await asyncio.gather(*(_arm(worker, random) for worker in pools.decode))
            found = await _answers(orchestrator, batch)
            struck += sum(await asyncio.gather(*map(_disarm, pools.decode)))
            asked += BATCH
            different += sum(before != after for before, after in zip(uncut, found, strict=True))
    goal = f"{struck} decode legs of {asked:,} streams end at random tokens: clients read the same events"
    return [Verdict(goal, f"{different} streams differ", different == 0 and struck >= scale.cuts)]


def _with_usage(question: Question) -> Question:
    """Ask for the usage, which is compared, too."""
    return replace(question, body={**question.body, "stream_options": {"include_usage": True}})


async def _arm(worker: Worker, random: Random) -> None:
    place = {"leg": "decode", "at_token": random.randrange(CUT_TOKENS), "count": EACH}
    await worker.add_faults({**random.choice(CUTS), **place})


async def _disarm(worker: Worker) -> int:
    """Return how many legs it has cut."""
    struck = sum(int(fault["struck"]) for fault in await worker.faults())
    await worker.clear_faults()
    return struck


async def _answers(orchestrator: Orchestrator, batch: Sequence[Question]) -> list[object]:
    return [*await asyncio.gather(*(_answer(orchestrator.port, question) for question in batch))]


async def _answer(port: int, question: Question) -> list[dict[str, Any]] | str:
    """Return the events of the stream, without what is another each time; or why it is not the right one."""
    try:
        answer = await fetch(port, question.path, json.dumps(question.body).encode())
        if judge(question, answer.status, answer.text) is not Outcome.RIGHT:
            return answer.text
    except (Failed, WrongAnswer) as error:
        return str(error)
    return [lasting(event) for event in events_of(answer.text.removesuffix(DONE))]


def lasting(event: dict[str, Any]) -> dict[str, Any]:
    """Leave out ids, times, and how much a worker had in its cache."""
    usage = event.get("usage")
    if usage is not None:
        usage = {name: value for name, value in usage.items() if name != "prompt_tokens_details"}
    return {**event, "id": None, "created": None, "usage": usage}


# --- amplification ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outage:
    """Something is out of order between `begin` and `end`."""

    what: str
    begin: Change
    end: Change


async def amplification(pools: Pools, scale: Scale) -> list[Verdict]:
    """Count the legs sent for each that was needed while something is out of order."""
    victims = (pools.prefill[0], pools.decode[0])
    half = pools.decode[: len(pools.decode) // 2]

    async def kill() -> None:
        for worker in victims:
            worker.signal(signal.SIGKILL)

    async def restart() -> None:
        await asyncio.gather(*(worker.restart() for worker in victims))

    async def refuse() -> None:
        await asyncio.gather(*(worker.add_faults(REFUSAL) for worker in half))

    async def serve() -> None:
        await asyncio.gather(*(worker.clear_faults() for worker in half))

    outages = [
        Outage("one of 4 prefill and one of 4 decode workers killed", kill, restart),
        Outage("two of 4 decode workers answer every leg with 503", refuse, serve),
    ]
    return [await _amplified(pools, scale, outage) for outage in outages]


async def _amplified(pools: Pools, scale: Scale, outage: Outage) -> Verdict:
    async with orchestrating(pools) as orchestrator:
        async with Load(orchestrator.port, questions(Random(scale.seed), CROWD_TOKENS), CROWD) as load:
            await load.reach(CROWD)
            begun, legs = load.begun, await _legs(orchestrator)
            await outage.begin()
            await asyncio.sleep(scale.outage_s)
            begun, legs = load.begun - begun, await _legs(orchestrator) - legs
            await outage.end()
            load.stop()
        explain(load.results)
    factor = legs / (LEGS * begun)
    when = f"{outage.what} for {scale.outage_s:.0f} s, {CROWD} requests open"
    goal = f"{when}: below {LIMIT} legs sent for each needed"
    return Verdict(goal, f"{factor:.3f}; {counted(load.results)} fail", factor < LIMIT)


async def _legs(orchestrator: Orchestrator) -> int:
    """Count the legs sent so far; without a connection to send it on one is not sent."""
    metrics = await orchestrator.metrics()
    return int(metrics["baton_upstream_connects"] + metrics["baton_upstream_reuses"])
