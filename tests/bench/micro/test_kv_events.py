from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.micro.kv_events import bytes_per_block, learned_us, removed_us, stored_us
from orchestrator.routing.policies.kv_events import BLOCK_BYTES


@pytest.mark.parametrize("measured", [stored_us, removed_us, learned_us])
def test_what_batches_and_answers_cost_is_measured(measured: Callable[[int, int], float]) -> None:
    assert 0 < measured(8, 1) < 1e6


def test_a_block_takes_no_more_memory_than_it_is_reckoned_with() -> None:
    assert 0 < bytes_per_block(64 * 200) <= BLOCK_BYTES
