"""These times tell how soon the orchestrator knows; they are of a machine that does nothing else."""

from __future__ import annotations

import asyncio
import json
import signal
from itertools import islice
from random import Random

from bench.chaos.client import Answer, Connection, Load, fetch, questions
from bench.chaos.kills import TOKENS, Scale
from bench.chaos.report import within
from bench.chaos.site import IN_SERVICE, Change, Orchestrator, Pools, Worker, orchestrating, wait_for
from bench.shared.verdict import Verdict

RESETS = [{"kind": "reset", "leg": leg} for leg in ("any", "health")]
LEFT = 20  # streams
LONG = 1000  # tokens of a stream that is left
ASKED = 50  # requests while nobody decodes


async def times(pools: Pools, scale: Scale) -> list[Verdict]:
    """Measure from an event to what follows from it, as a client or the admin API sees it."""
    async with orchestrating(pools) as orchestrator:
        return [
            await _cancellation(orchestrator, pools, scale),
            *await _ejections(orchestrator, pools, scale),
            *await _pool_gone(orchestrator, pools, scale),
        ]


async def _cancellation(orchestrator: Orchestrator, pools: Pools, scale: Scale) -> Verdict:
    """A client leaves a stream, and the decode worker stops."""
    found = [await _until_stopped(orchestrator, pools, scale) for _ in range(LEFT)]
    return within("a worker stops when the client leaves", found, 0.1)


async def _until_stopped(orchestrator: Orchestrator, pools: Pools, scale: Scale) -> float:
    async def are_idle() -> bool:
        return not any(await asyncio.gather(*(worker.running() for worker in pools.decode)))

    question = next(q for q in questions(Random(scale.seed), LONG) if q.is_stream)
    connection = await Connection.open(orchestrator.port)
    answer = Answer()
    asking = asyncio.create_task(
        connection.ask(question.path, json.dumps(question.body).encode(), into=answer)
    )
    await wait_for(lambda: _has_begun(answer), "a stream to begin")
    connection.close()
    seconds = await wait_for(are_idle, "the workers to be idle")
    await asyncio.gather(asking, return_exceptions=True)
    return seconds


async def _has_begun(answer: Answer) -> bool:
    return b"data: " in answer.body


async def _ejections(orchestrator: Orchestrator, pools: Pools, scale: Scale) -> list[Verdict]:
    victim = pools.decode[0]

    async def until_out(change: Change, mend: Change) -> float:
        async with Load(orchestrator.port, questions(Random(scale.seed), TOKENS), scale.clients) as load:
            await load.reach(scale.clients)
            await change()
            seconds = await wait_for(lambda: _is_out(orchestrator, victim), "the worker to be out of service")
            load.stop()
        await mend()
        await orchestrator.wait_ready(1, len(pools.workers))
        return seconds

    async def kill() -> None:
        victim.signal(signal.SIGKILL)

    async def stop() -> None:
        victim.signal(signal.SIGSTOP)

    async def go_on() -> None:
        victim.signal(signal.SIGCONT)

    return [
        within("a worker that is killed is out of service", [await until_out(kill, victim.restart)], 0.5),
        within(
            "one that resets every connection",
            [await until_out(lambda: victim.add_faults(*RESETS), victim.clear_faults)],
            0.5,
        ),
        within("one that stands still (SIGSTOP)", [await until_out(stop, go_on)], 3.0),
    ]


async def _is_out(orchestrator: Orchestrator, worker: Worker) -> bool:
    return (await orchestrator.worker_states())[worker.port] not in IN_SERVICE


async def _pool_gone(orchestrator: Orchestrator, pools: Pools, scale: Scale) -> list[Verdict]:
    async def is_not_ready() -> bool:
        return not await orchestrator.is_ready()

    for worker in pools.decode:
        worker.signal(signal.SIGKILL)
    until_not_ready = await wait_for(is_not_ready, "/ready to be 503")
    refusals = [await _refusal(orchestrator, scale) for _ in range(ASKED)]
    await asyncio.gather(*(worker.stop() for worker in pools.decode))
    await pools.decode[0].start()
    until_ready = await wait_for(orchestrator.is_ready, "/ready to be 200")
    await asyncio.gather(*(worker.start() for worker in pools.decode[1:]))
    return [
        within("/ready is 503 after the last decode worker is killed", [until_not_ready], 1.0),
        within("a request is answered 503 then", refusals, 0.05),
        within("/ready is 200 after one decode worker listens again", [until_ready], 1.0),
    ]


async def _refusal(orchestrator: Orchestrator, scale: Scale) -> float:
    """Return how long the answer takes; without end if it is another one."""
    question = next(islice(questions(Random(scale.seed), TOKENS), 1))
    loop = asyncio.get_running_loop()
    began = loop.time()
    answer = await fetch(orchestrator.port, question.path, json.dumps(question.body).encode())
    return loop.time() - began if answer.status == 503 else float("inf")
