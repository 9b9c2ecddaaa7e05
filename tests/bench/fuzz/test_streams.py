"""A short run of what `make fuzz` does with frames: memory, and what is left, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from bench.fuzz.streams import fuzz_orchestrator, fuzz_worker
from bench.shared.verdict import Verdict

FRAMES = 5_000


@pytest.mark.processes
@pytest.mark.parametrize("fuzz", [fuzz_worker, fuzz_orchestrator])
def test_hostile_frames_cost_little_and_leave_nothing(
    fuzz: Callable[[int, int], Coroutine[Any, Any, list[Verdict]]],
) -> None:
    verdicts = uvloop.run(fuzz(1, FRAMES))
    assert len(verdicts) == 5
    assert [verdict for verdict in verdicts if verdict.holds is False] == []
