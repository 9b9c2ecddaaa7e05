"""Signals go to workers, to a process of the orchestrator, and to the launcher, in the middle of a load."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from signal import Signals

from bench.chaos.client import End, Load, Result, questions
from bench.chaos.report import none_failed, none_failed_alone, nothing, reasons, tally
from bench.chaos.site import IN_SERVICE, Orchestrator, Pools, Worker, launched, orchestrating, wait_for
from bench.shared.verdict import Verdict

TOKENS = 24  # of each answer


@dataclass(frozen=True)
class Scale:
    """A run asks, cancels and cuts so much."""

    requests: int
    clients: int
    cancels: int
    cuts: int
    outage_s: float
    seed: int


def load_of(orchestrator: Orchestrator, scale: Scale, *, asks_process: bool = False) -> Load:
    asked = islice(questions(Random(scale.seed), TOKENS), scale.requests)
    return Load(orchestrator.port, asked, scale.clients, asks_process=asks_process)


def explain(results: Sequence[Result]) -> None:
    """Tell whoever looks for the fault why requests failed."""
    for reason in reasons(results):
        print(f"    {reason}", file=sys.stderr, flush=True)


# --- workers ------------------------------------------------------------------------------------


async def workers(pools: Pools, scale: Scale, number: Signals) -> list[Verdict]:
    """One of each role gets the signal; once it is out of service it comes back."""
    victims = (pools.prefill[0], pools.decode[0])
    async with orchestrating(pools) as orchestrator:
        async with load_of(orchestrator, scale) as load:
            await load.reach(scale.requests // 4)
            for victim in victims:
                victim.signal(number)
            await wait_for(lambda: _are_out(orchestrator, victims), "the workers to be out of service")
            await asyncio.gather(*(_bring_back(victim, number) for victim in victims))
        explain(load.results)
        await orchestrator.wait_ready(1, len(pools.workers))
        return [
            none_failed_alone(load.results, f"{number.name} to one of 4 prefill and one of 4 decode workers"),
            await given_back(orchestrator),
        ]


async def rolling(pools: Pools, scale: Scale) -> list[Verdict]:
    """All workers are started again, one after the other, while requests come without end."""
    async with orchestrating(pools) as orchestrator:
        async with Load(orchestrator.port, questions(Random(scale.seed), TOKENS), scale.clients) as load:
            for worker in pools.workers:
                await worker.restart()
                await orchestrator.wait_ready(1, len(pools.workers))
            await load.reach(scale.requests)
            load.stop()
        explain(load.results)
        return [
            none_failed(load.results, f"all {len(pools.workers)} workers restarted in turn"),
            await given_back(orchestrator),
        ]


async def _are_out(orchestrator: Orchestrator, victims: Sequence[Worker]) -> bool:
    states = await orchestrator.worker_states()
    return not any(states[victim.port] in IN_SERVICE for victim in victims)


async def _bring_back(victim: Worker, number: Signals) -> None:
    if number is signal.SIGSTOP:
        victim.signal(signal.SIGCONT)
    else:
        await victim.restart()


async def given_back(orchestrator: Orchestrator) -> Verdict:
    """Of leases only leaked ones count: those of a killed worker are kept until their time is over."""
    held: dict[str, int] = {}

    async def is_nothing_held() -> bool:
        found = await orchestrator.held()
        held.update({name: number for name, number in found.items() if name != "kv leases"})
        return not any(held.values())

    await wait_for(is_nothing_held, "everything to be given back")
    return nothing("after the load: nothing in flight, no lease leaked", held)


# --- one of the orchestrator's processes --------------------------------------------------------


async def process(pools: Pools, scale: Scale, number: Signals) -> list[Verdict]:
    """One of two gets the signal; another one takes its place."""
    async with orchestrating(pools, processes=2) as orchestrator:
        async with load_of(orchestrator, scale, asks_process=number is not signal.SIGTERM) as load:
            await load.reach(scale.requests // 3)
            victim = (await orchestrator.processes())[0]["pid"]
            struck = asyncio.get_running_loop().time()
            os.kill(victim, number)
            await wait_for(lambda: _is_replaced(orchestrator, victim), "another process")
        explain([result for result in load.results if not was_open_in(result, victim, struck)])
        await orchestrator.wait_ready(2, len(pools.workers))
        if number is signal.SIGTERM:
            return [
                none_failed(load.results, f"{number.name} to one of 2 processes"),
                await given_back(orchestrator),
            ]
        return [only_open_failed(load.results, victim, struck, number), await given_back(orchestrator)]


async def _is_replaced(orchestrator: Orchestrator, victim: int) -> bool:
    return all(process["pid"] != victim for process in await orchestrator.processes())


def was_open_in(result: Result, process: int, struck: float) -> bool:
    """Say whether a request was in this process then, or may have been: its connection may be unknown."""
    return result.began <= struck <= result.ended and result.process in (process, None)


def only_open_failed(results: Sequence[Result], process: int, struck: float, number: Signals) -> Verdict:
    excused = [result for result in results if was_open_in(result, process, struck)]
    others = [result for result in results if not was_open_in(result, process, struck)]
    holds = not any(r.has_failed for r in others) and not any(r.end is End.WRONG for r in excused)
    found = f"{tally(excused)} that were open in it; {tally(others)} others"
    return Verdict(
        f"{number.name} to one of 2 processes: only requests open in it fail, the other takes the rest",
        found,
        holds,
    )


# --- the launcher -------------------------------------------------------------------------------


async def launcher_terminated(pools: Pools, scale: Scale) -> list[Verdict]:
    """`baton up` is asked to end under load; nobody asks anything after that."""
    async with launched() as launcher:
        async with load_of(launcher.orchestrator, scale) as load:
            await load.reach(scale.requests // 3)
            load.stop()
            open_then, before = load.open, len(load.results)
            launcher.signal(signal.SIGTERM)
        explain(load.results)
        left = await launcher.wait_gone()
    goal = f"SIGTERM to `baton up`: the {open_then} requests that are open are answered"
    return [
        Verdict(goal, tally(load.results[before:]) + " fail", not any(r.has_failed for r in load.results)),
        nothing("after that: no process is left", {"processes": left}),
    ]


async def launcher_stopped_and_killed(pools: Pools, scale: Scale) -> list[Verdict]:
    """`baton up` stands still for the whole of a load, and is killed in the middle of another."""
    async with launched() as launcher:
        launcher.signal(signal.SIGSTOP)
        try:
            async with load_of(launcher.orchestrator, scale) as load:
                pass
        finally:
            launcher.signal(signal.SIGCONT)
        explain(load.results)
        async with load_of(launcher.orchestrator, scale) as interrupted:
            await interrupted.reach(scale.clients)
            launcher.signal(signal.SIGKILL)
            left = await launcher.wait_gone()
            interrupted.stop()
    wrong = [result for result in interrupted.results if result.end is End.WRONG]
    return [
        none_failed(load.results, "SIGSTOP to `baton up`"),
        nothing("SIGKILL to `baton up`: no process is left", {"processes": left}),
        nothing("and no answer is wrong", {"wrong": len(wrong)}),
    ]
