from __future__ import annotations

import asyncio

import pytest

from worker.sim.clock import PrefillClock, StepClock
from worker.sim.latency import Latency


def test_the_model_as_stated() -> None:
    latency = Latency(
        prefill_us_per_token=50, transfer_us_per_token=2, decode_ms_per_token=10, decode_ms_per_running=0.5
    )
    assert latency.prefill_s(1000) == pytest.approx(0.05)
    assert latency.transfer_s(1000) == pytest.approx(0.002)
    assert latency.step_s(1) == pytest.approx(0.010)
    assert latency.step_s(9) == pytest.approx(0.014)
    assert Latency(prefill_ms=20).prefill_s(5) == pytest.approx(0.020)
    assert Latency(transfer_ms=4).transfer_s(5) == pytest.approx(0.004)
    assert Latency().step_s(100) == Latency().prefill_s(10**6) == 0.0


def test_what_a_cache_holds_saves_its_share_of_attention() -> None:
    latency = Latency(prefill_us_per_token=90, prefill_ns_per_token_squared=0.6)
    assert latency.prefill_s(1000) == pytest.approx(0.090 + 0.0006)
    assert latency.prefill_s(1000, 400) == pytest.approx(0.054 + 0.6e-9 * (1000**2 - 400**2))


def test_a_step_reads_the_kv_caches_of_all_that_run() -> None:
    latency = Latency(decode_ms_per_token=28, decode_ms_per_running=0.2, decode_ns_per_kv_token=40)
    assert latency.step_s(3, 50_000) == pytest.approx(0.028 + 2 * 0.0002 + 0.002)


def test_a_step_serves_all_that_wait() -> None:
    async def together() -> tuple[list[int], float]:
        clock, loop = StepClock(Latency(decode_ms_per_token=20)), asyncio.get_running_loop()
        started, served = loop.time(), []

        async def run() -> None:
            for step in range(3):
                await clock.wait_step(running=8)
                served.append(step)

        await asyncio.gather(*(run() for _ in range(8)))
        return served, loop.time() - started

    served, took = asyncio.run(together())
    assert served == [0] * 8 + [1] * 8 + [2] * 8
    assert took >= 0.055  # the event loop's clock may be early by its resolution


def test_a_batch_makes_steps_longer() -> None:
    async def one_step(running: int) -> float:
        clock, loop = StepClock(Latency(decode_ms_per_running=10)), asyncio.get_running_loop()
        started = loop.time()
        await clock.wait_step(running)
        return loop.time() - started

    assert asyncio.run(one_step(6)) >= 0.045


def test_who_leaves_during_a_step_disturbs_nobody() -> None:
    async def leave() -> None:
        clock = StepClock(Latency(decode_ms_per_token=5))
        leaving, staying = (asyncio.ensure_future(clock.wait_step(2)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await staying
        assert leaving.cancelled()

    asyncio.run(leave())


def test_free_steps_take_turns() -> None:
    async def race() -> bool:
        clock, others_turn = StepClock(Latency()), asyncio.Event()
        asyncio.get_running_loop().call_soon(others_turn.set)
        for _ in range(1000):
            await clock.wait_step(1)
        return others_turn.is_set()

    assert asyncio.run(race())


def test_prompts_are_computed_in_the_order_of_their_arrival() -> None:
    async def queue() -> tuple[list[int], float]:
        clock, loop = PrefillClock(Latency(prefill_us_per_token=1000)), asyncio.get_running_loop()
        started, order = loop.time(), []

        async def run(number: int) -> None:
            await clock.compute(10)
            order.append(number)

        await asyncio.gather(*map(run, range(5)))
        return order, loop.time() - started

    order, took = asyncio.run(queue())
    assert order == [0, 1, 2, 3, 4]
    assert took >= 0.045


def test_a_prompt_that_is_given_up_makes_room() -> None:
    async def give_up() -> None:
        clock = PrefillClock(Latency(prefill_us_per_token=1000))
        long = asyncio.ensure_future(clock.compute(3_600_000))
        short = asyncio.ensure_future(clock.compute(1))
        await asyncio.sleep(0)
        long.cancel()
        async with asyncio.timeout(60):
            await short

    asyncio.run(give_up())


def test_prompts_are_computed_by_their_priorities_and_those_that_left_are_passed_over() -> None:
    async def in_order() -> list[str]:
        clock, computed = PrefillClock(Latency(prefill_us_per_token=1000)), []

        async def compute(name: str, priority: int) -> None:
            await clock.compute(5, priority=priority)
            computed.append(name)

        names = {"first": 9, "late": 2, "left": -1, "soon": 1, "equal": 1, "next": 0, "stopped": 3}
        tasks = {name: asyncio.create_task(compute(name, priority)) for name, priority in names.items()}
        await asyncio.sleep(0)
        tasks["left"].cancel()
        tasks["late"].add_done_callback(lambda _: tasks["stopped"].cancel())  # in its turn
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await compute("again", 0)
        return computed

    assert asyncio.run(in_order()) == ["first", "next", "soon", "equal", "late", "again"]
