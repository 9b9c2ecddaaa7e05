from __future__ import annotations

import pytest

from bench.shared.verdict import Verdict
from bench.soak import __main__ as soak
from bench.soak.load import Tally
from bench.soak.measures import Held


@pytest.mark.parametrize(
    ("argv", "requests", "slope"),
    [
        ([], 200_000, 1.0),
        (["--quick"], 10_000, 20.0),
        (["--quick", "--requests", "500"], 500, 20.0),
        (["--slope", "0"], 200_000, 0.0),
    ],
)
def test_quick_is_shorter_and_looser(argv: list[str], requests: int, slope: float) -> None:
    options = soak.arguments(argv)
    assert (options.requests, options.slope) == (requests, slope)


def test_memory_is_sampled_as_requests_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "rss_bytes", lambda pid: pid * 1_000_000)
    progress, tally = soak.Progress(70, 1000), Tally()
    for _ in range(1000):
        tally.answered["chat"] += 1
        progress.note(tally)
    assert [sample.requests for sample in progress.samples] == list(range(10, 1001, 10))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[-1].split()[:4] == ["1,000", "requests", "70.0", "MB"]


@pytest.mark.parametrize("is_met", [True, False])
def test_one_goal_that_is_missed_is_enough(is_met: bool, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict("tasks: as at the start", "9 -> 9", True), Verdict("slope", "+3.00", is_met)]
    assert soak.report(verdicts) is is_met
    assert ("MISSED" in capsys.readouterr().out) is not is_met


def held(descriptors: int) -> Held:
    return Held(
        descriptors=descriptors, tasks=9, requests=0, legs=0, busy_connections=0, kv_blocks=0, kv_pins=0
    )


class FakeSite:
    """What is held falls with every look."""

    def __init__(self, *descriptors: int) -> None:
        self._looks = [held(count) for count in descriptors]

    def held(self) -> Held:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


def test_start_is_what_two_looks_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LOOK_EVERY_S", 0.0)
    assert soak.steady(FakeSite(10, 16, 17, 17, 99)) == held(17)


def test_what_is_held_may_take_its_time_to_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LOOK_EVERY_S", 0.0)
    assert soak.settled(FakeSite(40, 30, 17, 99), held(17))[0] == held(17)


def test_what_never_falls_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SETTLE_LIMIT_S", 0.0)
    assert soak.settled(FakeSite(18), held(17))[0] == held(18)
