from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from orchestrator.loop.bounded_calls import BoundedCalls


def test_a_call_returns_or_raises_what_its_function_does() -> None:
    async def main() -> None:
        calls = BoundedCalls("test", 60)
        assert await calls.make(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await calls.make(divmod, 7, 0)
        assert await calls.make(sorted, "ba", reverse=True) == ["b", "a"]

    asyncio.run(main())


def test_while_one_hangs_no_other_begins() -> None:
    go, has_begun = threading.Event(), threading.Event()
    begun: list[str] = []

    def hang() -> int:
        begun.append(threading.current_thread().name)
        has_begun.set()
        go.wait(60)
        return len(begun)

    async def main() -> None:
        calls = BoundedCalls("test", 0.02)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await calls.make(hang)
        assert has_begun.wait(60)
        assert begun == ["test"]
        go.set()

    asyncio.run(main())


def test_a_call_waits_for_the_end_of_the_last_one() -> None:
    go = threading.Event()

    async def main() -> None:
        calls = BoundedCalls("test", 60)
        first = asyncio.create_task(calls.make(go.wait, 60))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(calls.make(lambda: "second"))
        await asyncio.sleep(0)
        go.set()
        assert await second == "second"

    asyncio.run(main())


@pytest.mark.processes
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_end_of_the_process_does_not_wait(loop: str) -> None:
    code = f"""
import asyncio, {loop}, time
from orchestrator.loop.bounded_calls import BoundedCalls
async def main():
    try:
        await BoundedCalls("test", 0.05).make(time.sleep, 3600)
    except TimeoutError:
        print("too long")
with asyncio.Runner(loop_factory={loop}.new_event_loop) as runner:
    runner.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "too long\n"
    assert done.stderr == ""
