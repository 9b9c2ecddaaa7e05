from __future__ import annotations

import asyncio
import itertools
import time
from random import Random
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.schedule import arrivals, keep
from tests.launch.bench.fakes import run


@given(st.floats(0.01, 200), st.floats(0.1, 50), st.integers())
def test_a_schedule_asks_for_its_rate(rate: float, duration_s: float, seed: int) -> None:
    moments = arrivals(rate, duration_s, Random(seed))
    assert len(moments) == max(1, round(rate * duration_s))
    assert moments == sorted(moments)
    assert moments[0] >= 0
    assert moments[-1] <= duration_s


def test_the_seed_is_the_schedule() -> None:
    assert arrivals(5, 10, Random(1)) == arrivals(5, 10, Random(1))
    assert arrivals(5, 10, Random(1)) != arrivals(5, 10, Random(2))


def test_arrivals_are_as_bursty_as_independent_clients() -> None:
    """The gaps of a Poisson process are exponential: their deviation is their mean."""
    moments = arrivals(100, 100, Random(0))
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.05)


def test_every_moment_is_called_in_order_and_not_early() -> None:
    calls: list[tuple[int, float, float]] = []

    async def main() -> None:
        await keep([0.0, 0.001, 0.001, 0.02], lambda at, due: calls.append((at, due, time.perf_counter())))

    run(main())
    assert [number for number, _, _ in calls] == [0, 1, 2, 3]
    assert all(due <= called for _, due, called in calls)
    assert calls[3][1] - calls[0][1] == pytest.approx(0.02)


def test_a_busy_client_falls_behind_and_can_tell() -> None:
    """What is due while the event loop is held up keeps its own moment."""
    late: list[float] = []

    def send(number: int, due: float) -> None:
        late.append(time.perf_counter() - due)
        if number == 0:
            time.sleep(0.2)

    async def main() -> None:
        await keep([0.0, 0.01], send)

    run(main())
    assert late[1] > 0.1


def test_cancelling_ends_the_calls() -> None:
    calls: list[int] = []

    async def main() -> None:
        first = asyncio.Event()

        def send(number: int, due: float) -> None:
            calls.append(number)
            first.set()

        task = asyncio.create_task(keep([0.0, 600.0], send))
        await first.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main())  # and its thread ends, or this would wait for ten minutes
    assert calls == [0]
