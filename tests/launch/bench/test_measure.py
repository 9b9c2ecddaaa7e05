from __future__ import annotations

import asyncio
import json

import pytest

from launch.bench.errors import BenchError
from launch.bench.measure import Run, Tally, measure
from launch.bench.prompts import Prompts
from launch.bench.results import Load, Step, Unit
from launch.bench.shapes import WORKLOADS
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream
from tests.launch.bench.fakes import CORPUS, SLO, FakeEndpoint, client_of, run, serving, session_on

CHAT = WORKLOADS["chat"]


async def measured(upstream: MemoryUpstream, load: Load, duration_s: float) -> tuple[Step, Tally]:
    tallies: list[Tally] = []
    prompts = Prompts(CORPUS, "tiny", {}, 2.0, seed="0", salt="s")
    step = await measure(client_of(upstream), prompts, Run(CHAT, load, duration_s, "0"), SLO, tallies.append)
    return step, tallies[0]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """All requests are sent although none is answered before the last one has come."""
    endpoint = FakeEndpoint()

    async def main() -> Step:
        everybody = asyncio.Barrier(20)

        async def together(request: MemoryRequest, reply: MemoryReply) -> None:
            await everybody.wait()
            await endpoint(request, reply)

        step, tally = await measured(serving(together), Load(200, Unit.RATE), 0.1)
        assert tally.sent == 20
        return step

    step = run(main())
    assert (step.requests, step.ok, step.errors) == (20, 20, {})
    assert step.seconds >= 0.1


def test_a_closed_loop_has_so_many_requests_at_once() -> None:
    endpoint, at_once = FakeEndpoint(), set()

    async def main() -> Step:
        upstream = MemoryUpstream()

        async def count(request: MemoryRequest, reply: MemoryReply) -> None:
            at_once.add(upstream.stats().busy)
            await endpoint(request, reply)

        upstream.serve(client_of(upstream).endpoint.origin, count)
        return (await measured(upstream, Load(3, Unit.CONCURRENT), 0.1))[0]

    step = run(main())
    assert max(at_once) == 3
    assert step.ok == step.requests == len(endpoint.seen) >= 3


def test_a_closed_loop_does_not_storm_an_endpoint_that_refuses() -> None:
    async def main() -> Step:
        return (await measured(MemoryUpstream(), Load(1, Unit.CONCURRENT), 0.05))[0]

    assert run(main()).errors == {"no connection": 1}


def test_steps_of_a_session_share_no_prompt_but_the_work() -> None:
    endpoint = FakeEndpoint()
    session = session_on(endpoint)

    async def main() -> None:
        for _ in range(2):
            await session.step(CHAT, Load(100, Unit.RATE), 0.05)

    run(main())
    warm_up, *asked = endpoint.seen
    assert len(asked) == 10
    assert len({json.dumps(each["messages"]) for each in endpoint.seen}) == 11
    lengths = [each["max_tokens"] for each in asked]
    assert sorted(lengths[:5]) == sorted(lengths[5:])
    assert warm_up["max_tokens"] in lengths
    assert [step.requests for step in session.steps] == [5, 5]


def test_an_endpoint_that_goes_ends_the_session_and_leaves_what_was_found() -> None:
    endpoint = FakeEndpoint()
    session = session_on(endpoint)
    upstream = session._client.upstream
    assert isinstance(upstream, MemoryUpstream)

    async def main() -> None:
        await session.step(CHAT, Load(100, Unit.RATE), 0.05)
        upstream.refuse(session._client.endpoint.origin)
        with pytest.raises(BenchError, match="http://endpoint:1/v1 has gone: no connection"):
            await session.step(CHAT, Load(100, Unit.RATE), 0.05)

    run(main())
    assert session.steps[0].ok == 5
