from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.options import PROFILES as DEFAULTS
from launch.bench.profiles import PROFILES, Plan, RateSearch
from launch.bench.results import Load, Step, Unit
from launch.bench.shapes import WORKLOADS, Workload
from tests.launch.bench.fakes import SLO, sample, step


@dataclass
class FakeBench:
    """Holds up to a rate."""

    capacity: float = 10.0
    sustained: dict[str, float] = field(default_factory=dict)
    asked: list[tuple[str, Load, float]] = field(default_factory=list)

    async def step(self, workload: Workload, load: Load, duration_s: float) -> Step:
        self.asked.append((workload.name, load, duration_s))
        return step([sample(ttft_ms=50 if load.value <= self.capacity else 500)])


def play(profile: str, bench: FakeBench, *workloads: str, rate: float = 4.0) -> list[tuple[str, float]]:
    plan = Plan([WORKLOADS[name] for name in workloads], rate, 10.0, (1, 8), SLO)
    asyncio.run(PROFILES[profile](bench, plan))
    return [(name, load.value) for name, load, _ in bench.asked]


def test_every_profile_has_defaults() -> None:
    assert list(PROFILES) == list(DEFAULTS)
    assert all(name in WORKLOADS for defaults in DEFAULTS.values() for name in defaults.workloads)


def test_quick_is_thirty_seconds_of_chat() -> None:
    assert (DEFAULTS["quick"].workloads, DEFAULTS["quick"].duration_s) == (("chat",), 30)
    assert play("quick", FakeBench(), "chat") == [("chat", 4)]


def test_full_goes_below_and_above_the_rate() -> None:
    steps = play("full", FakeBench(), "chat", "agentic")
    chats, prompts = [("chat", rate) for rate in (2, 4, 8)], [("agentic", rate) for rate in (0.2, 0.4, 0.8)]
    assert steps == chats + prompts


def test_matrix_is_a_closed_loop() -> None:
    bench = FakeBench()
    assert play("matrix", bench, "chat", "mixed") == [("chat", 1), ("chat", 8), ("mixed", 1), ("mixed", 8)]
    assert {load.unit for _, load, _ in bench.asked} == {Unit.CONCURRENT}


def test_sustained_finds_what_holds() -> None:
    bench = FakeBench(capacity=10)
    steps = play("sustained", bench, "chat")
    assert steps[:3] == [("chat", 4), ("chat", 8), ("chat", 16)]
    assert 9 <= bench.sustained["chat"] <= 10


def test_a_slow_rate_takes_as_long_as_a_verdict_needs() -> None:
    bench = FakeBench(capacity=1)
    play("sustained", bench, "chat", rate=1)
    assert all(load.value * duration_s >= 19.99 for _, load, duration_s in bench.asked)


def test_nothing_holds() -> None:
    bench = FakeBench(capacity=0)
    steps = play("sustained", bench, "chat")
    assert bench.sustained == {"chat": 0}
    assert steps[-1][1] >= 0.1


@given(st.floats(0.2, 1e4), st.floats(0.1, 1e3))
def test_the_search_ends_close_below_the_border(border: float, start: float) -> None:
    search, tries = RateSearch(start), 0
    while (rate := search.next_rate()) is not None:
        search.note(rate, holds=rate <= border)
        tries += 1
    assert tries < 40
    if search.held:
        assert search.held <= border < search.failed <= search.held * 1.11
    else:
        assert border < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_the_search_ends_whatever_it_hears(seed: int) -> None:
    """Near the border a rate may hold once and fail the next time."""
    from random import Random

    random, search, tries = Random(seed), RateSearch(4.0), 0
    while (rate := search.next_rate()) is not None:
        search.note(rate, holds=random.random() < 0.5)
        tries += 1
    assert tries < 100
