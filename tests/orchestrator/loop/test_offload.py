from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from orchestrator.errors import BatonError
from orchestrator.loop.offload import Offload

pytestmark = pytest.mark.processes

LIMIT_S = 60.0
ROOT = Path(__file__).parents[3]


def run(test: Callable[[Offload], Awaitable[None]]) -> None:
    """At its end no file is open that was not before."""

    async def main() -> None:
        pool = Offload()
        async with asyncio.timeout(LIMIT_S):
            try:
                await test(pool)
            finally:
                await pool.aclose()

    before = mailboxes()
    asyncio.run(main())
    assert mailboxes() == before


def mailboxes() -> int:
    paths = (entry.path for entry in os.scandir("/proc/self/fd"))
    return sum("baton-offload" in os.readlink(path) for path in paths if os.path.islink(path))


# --- what runs in the other process -------------------------------------------------------------


def pid_of(data: bytes) -> tuple[int, bytes]:
    return os.getpid(), b""


def repeated(data: bytes, times: int) -> tuple[int, bytes]:
    return len(data), data * times


def parsed(data: bytes) -> tuple[object, bytes]:
    return json.loads(data), b""


def die(data: bytes) -> tuple[None, bytes]:
    os.kill(os.getpid(), signal.SIGKILL)
    return None, b""


def die_once(data: bytes, marker: Path) -> tuple[int, bytes]:
    """Kills the process that calls it, unless one was killed before."""
    if not marker.exists():
        marker.touch()
        die(data)
    return os.getpid(), data


def wait_between(data: bytes, begun: Path, go: Path) -> tuple[None, bytes]:
    """Both are pipes."""
    begun.write_bytes(b"")
    go.read_bytes()
    return None, b"late" * len(data)


def sigint_handler(data: bytes) -> tuple[str, bytes]:
    return str(signal.getsignal(signal.SIGINT)), b""


async def pid(pool: Offload) -> int:
    return (await pool.run(pid_of, b""))[0]


# --- tests --------------------------------------------------------------------------------------


def test_it_is_another_process_and_always_the_same() -> None:
    async def test(pool: Offload) -> None:
        first = await pid(pool)
        assert first != os.getpid()
        assert await pid(pool) == first

    run(test)


def test_nothing_is_started_before_the_first_call() -> None:
    async def test(pool: Offload) -> None:
        assert pool._executor is None

    run(test)


def test_calls_at_the_same_time_start_one_process() -> None:
    async def test(pool: Offload) -> None:
        assert len(set(await asyncio.gather(*(pid(pool) for _ in range(5))))) == 1

    run(test)


@pytest.mark.parametrize("size", [0, 1, 100_000, 9_000_000])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_bytes_go_there_and_come_back(size: int, times: int) -> None:
    async def test(pool: Offload) -> None:
        data = random.Random(size).randbytes(size)
        assert await pool.run(repeated, data, times) == (size, data * times)

    run(test)


def test_every_call_gets_its_own_bytes() -> None:
    """Mailboxes are used again, by longer and by shorter bodies."""

    async def test(pool: Offload) -> None:
        bodies = [bytes([index]) * (index * 7919 % 50_000) for index in range(60)]
        for _ in range(3):
            found = await asyncio.gather(*(pool.run(repeated, body, times=2) for body in bodies))
            assert found == [(len(body), body * 2) for body in bodies]

    run(test)


def test_what_the_function_raises_arrives() -> None:
    async def test(pool: Offload) -> None:
        with pytest.raises(json.JSONDecodeError):
            await pool.run(parsed, b"{")
        assert await pool.run(parsed, b"[1]") == ([1], b"")

    run(test)


def test_a_killed_process_is_replaced_and_the_call_made_again(tmp_path: Path) -> None:
    async def test(pool: Offload) -> None:
        before = await pid(pool)
        after, data = await pool.run(die_once, b"abc", tmp_path / "died")
        assert (after != before, data) == (True, b"abc")

    run(test)


def test_a_killed_process_costs_no_other_call(tmp_path: Path) -> None:
    async def test(pool: Offload) -> None:
        others = [pool.run(repeated, bytes([index]), 2) for index in range(3)]
        _, *found = await asyncio.gather(pool.run(die_once, b"", tmp_path / "died"), *others)
        assert found == [(1, bytes([index]) * 2) for index in range(3)]

    run(test)


def test_a_call_that_kills_twice_is_an_error_and_the_next_one_is_served() -> None:
    async def test(pool: Offload) -> None:
        with pytest.raises(BatonError, match="killed twice"):
            await pool.run(die, b"")
        assert await pid(pool) != os.getpid()

    run(test)


def test_a_call_that_is_cancelled_at_work_disturbs_no_other(tmp_path: Path) -> None:
    """It writes its late result into a mailbox that nobody else has."""

    async def test(pool: Offload) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        os.mkfifo(begun)
        os.mkfifo(go)
        call = asyncio.create_task(pool.run(wait_between, b"abc", begun, go))
        await asyncio.to_thread(begun.read_bytes)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        others = [asyncio.create_task(pool.run(repeated, bytes([index]), 2)) for index in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(go.write_bytes, b"")
        assert await asyncio.gather(*others) == [(1, bytes([index]) * 2) for index in range(3)]

    run(test)


def test_closing_ends_the_process_and_may_be_repeated() -> None:
    async def test(pool: Offload) -> None:
        ended = await pid(pool)
        await pool.aclose()
        await pool.aclose()
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)

    run(test)


def test_ctrl_c_is_left_to_the_parent() -> None:
    async def test(pool: Offload) -> None:
        assert (await pool.run(sigint_handler, b""))[0] == str(signal.Handlers.SIG_IGN)

    run(test)


def test_where_there_are_no_files_in_memory_a_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")

    async def test(pool: Offload) -> None:
        assert await pid(pool) == os.getpid()

    run(test)


PARENT = """
import asyncio
from orchestrator.loop.offload import Offload
from tests.orchestrator.loop.test_offload import pid

async def main():
    print(await pid(Offload()), flush=True)
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
