from __future__ import annotations

import asyncio

import pytest

from tests.simulation.loop import Deadlock, VirtualTimeLoop, run_virtually


def test_time_jumps_to_the_next_timer() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        moments = [loop.time()]
        for seconds in (3600, 0.25):
            await asyncio.sleep(seconds)
            moments.append(loop.time())
        return moments

    assert run_virtually(main()) == [0.0, 3600.0, 3600.25]


def test_timers_fire_in_the_order_of_their_times() -> None:
    async def main() -> list[str]:
        said = []
        loop = asyncio.get_running_loop()
        loop.call_later(2, said.append, "b")
        loop.call_later(1, said.append, "a")
        loop.call_soon(said.append, "now")
        await asyncio.sleep(3)
        return said

    assert run_virtually(main()) == ["now", "a", "b"]


def test_a_timeout_is_a_matter_of_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == 1000


def test_waiting_for_nothing_is_a_deadlock() -> None:
    loop = VirtualTimeLoop()
    waiting = loop.create_task(asyncio.Event().wait())
    with pytest.raises(Deadlock):
        loop.run_until_complete(waiting)
    waiting.cancel()
    loop.run_until_complete(asyncio.wait([waiting]))
    loop.close()


def test_a_thread_cannot_wake_it() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="thread"):
            asyncio.get_running_loop().call_soon_threadsafe(print)

    run_virtually(main())
