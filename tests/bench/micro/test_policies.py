from __future__ import annotations

import pytest

from bench.micro.policies import bytes_per_step, chosen, looked_up, paired
from orchestrator.routing.policies import POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_a_choice_and_its_end_are_measured(name: str) -> None:
    assert 0 < chosen(name, 8, 2_000, 1) < 1e6


def test_a_pair_and_a_look_up_are_measured() -> None:
    assert 0 < paired("least_tokens", 100, 1) < 1e6
    assert 0 < looked_up(1) < 1e6


@pytest.mark.parametrize("size", [1_100, 4_096, 50_000])
def test_a_step_takes_little_memory(size: int) -> None:
    assert bytes_per_step(size, 2_000) <= 120
