from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator.errors import BatonError
from orchestrator.offload import Offload

LIMIT_S = 60.0
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def offload(processes: int = 1) -> AsyncIterator[Offload]:
    made = Offload(processes)
    try:
        yield made
    finally:
        await made.aclose()


def run(test: Callable[[Offload], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT_S), offload() as made:
            await test(made)

    asyncio.run(main())


# --- what runs in the pool ----------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(marker: Path) -> int:
    """Kills the process that calls it, unless one was killed before."""
    if not marker.exists():
        marker.touch()
        die()
    return os.getpid()


def wait_until_there(marker: Path) -> None:
    while not marker.exists():
        os.sched_yield()


def sigint_handler() -> str:
    return str(signal.getsignal(signal.SIGINT))


# --- tests --------------------------------------------------------------------------------------


def test_it_is_another_process_and_always_the_same() -> None:
    async def test(pool: Offload) -> None:
        first = await pool.run(os.getpid)
        assert first != os.getpid()
        assert await pool.run(os.getpid) == first

    run(test)


def test_nothing_is_started_before_the_first_call() -> None:
    async def test(pool: Offload) -> None:
        assert pool._executor is None

    run(test)


def test_calls_at_the_same_time_start_one_pool() -> None:
    async def test(pool: Offload) -> None:
        assert len(set(await asyncio.gather(*(pool.run(os.getpid) for _ in range(5))))) == 1

    run(test)


def test_what_the_function_raises_arrives() -> None:
    async def test(pool: Offload) -> None:
        with pytest.raises(json.JSONDecodeError):
            await pool.run(json.loads, "{")
        assert await pool.run(json.loads, "{}") == {}

    run(test)


def test_a_killed_process_is_replaced_and_the_call_made_again(tmp_path: Path) -> None:
    async def test(pool: Offload) -> None:
        before = await pool.run(os.getpid)
        assert await pool.run(die_once, tmp_path / "died") != before

    run(test)


def test_one_killed_process_costs_no_other_call(tmp_path: Path) -> None:
    """All calls that waited for it are made again, in one fresh process."""

    async def test(pool: Offload) -> None:
        calls = [pool.run(die_once, tmp_path / "died"), *(pool.run(os.getpid) for _ in range(3))]
        died, *others = await asyncio.gather(*calls)
        assert died in {await pool.run(os.getpid), *others}

    run(test)


def test_a_call_that_kills_twice_is_an_error_and_the_next_one_is_served() -> None:
    async def test(pool: Offload) -> None:
        with pytest.raises(BatonError, match="killed twice"):
            await pool.run(die)
        assert await pool.run(os.getpid) != os.getpid()

    run(test)


def test_a_cancelled_call_is_dropped_and_the_pool_goes_on(tmp_path: Path) -> None:
    async def test(pool: Offload) -> None:
        await pool.run(os.getpid)
        call = asyncio.create_task(pool.run(wait_until_there, tmp_path / "go"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        (tmp_path / "go").touch()
        assert await pool.run(len, b"abc") == 3

    run(test)


def test_closing_ends_the_process_and_may_be_repeated() -> None:
    async def test(pool: Offload) -> None:
        pid = await pool.run(os.getpid)
        await pool.aclose()
        await pool.aclose()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test)


def test_ctrl_c_is_left_to_the_parent() -> None:
    async def test(pool: Offload) -> None:
        assert await pool.run(sigint_handler) == str(signal.Handlers.SIG_IGN)

    run(test)


PARENT = """
import asyncio, os
from orchestrator.offload import Offload

async def main():
    pool = Offload()
    print(await pool.run(os.getpid), flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where Python tells of the semaphores that a killed process leaves
    )
    with parent:
        assert parent.stdout is not None
        pool = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        asyncio.run(wait_until_ended(pool))
    finally:
        os.close(pool)


async def wait_until_ended(pidfd: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    async with asyncio.timeout(LIMIT_S):
        await ended.wait()
