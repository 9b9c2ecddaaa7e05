from __future__ import annotations

import os
from random import Random

import pytest

from bench.fuzz.__main__ import arguments_of
from bench.fuzz.frames import Burst, ToOrchestrator, ToWorker
from bench.fuzz.streams import QUICK_FRAMES, Memory, Tally
from orchestrator.wire.streams import LAST, OPEN, FrameError, FrameReader


def bursts(seed: int, count: int) -> list[Burst]:
    random = Random(seed)
    return [burst for _ in range(count) for burst in ToWorker(random).bursts()]


def test_a_seed_makes_the_same_frames_again() -> None:
    assert bursts(1, 20) == bursts(1, 20)
    assert bursts(1, 20) != bursts(2, 20)


def test_a_burst_says_how_many_frames_it_has() -> None:
    for burst in bursts(1, 60):
        kinds: list[int] = []
        if not burst.is_fatal:
            FrameReader(lambda kind, *rest, kinds=kinds: kinds.append(kind)).feed(burst.data)
            assert len(kinds) == burst.frames


def test_frames_are_of_all_kinds_and_some_are_none() -> None:
    orchestrator = ToOrchestrator(Random(1))
    orchestrator.opened = [1, 2, 3]
    kinds: set[int] = set()
    broken = 0
    for burst in [*bursts(1, 60), *(orchestrator.burst() for _ in range(300))]:
        try:
            FrameReader(lambda kind, *rest: kinds.add(kind)).feed(burst.data)
        except FrameError:
            broken += burst.is_fatal
    assert kinds == set(range(OPEN, LAST + 1))
    assert broken > 5


def test_a_tally_knows_when_enough_was_sent() -> None:
    tally = Tally(3)
    tally.count(Burst(b"", 2))
    assert not tally.is_done.is_set()
    tally.count(Burst(b"", 2, is_fatal=True))
    assert (tally.is_done.is_set(), tally.sent, tally.fatal) == (True, 4, 1)


@pytest.mark.parametrize(("size", "holds"), [(0, True), (100 * 1024 * 1024, False)])
def test_what_a_process_grows_by_is_seen_although_it_gives_it_back(size: int, holds: bool) -> None:
    memory = Memory(os.getpid())
    taken = b"a" * size
    del taken
    assert memory.verdict("worker").holds is holds


def test_how_many_frames_is_an_option() -> None:
    assert arguments_of(["--frames", "7"]).frames == 7
    assert QUICK_FRAMES <= 100_000
