from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.bench import plot
from launch.bench.errors import BenchError, WrongUsage
from launch.bench.results import AbResult, Result
from tests.launch.bench.fakes import result, sample, step
from tests.launch.bench.test_report import ab_result

FAILED = [sample(error="timeout")]
RESULTS = {
    "one step": result(step([sample(), sample(ttft_ms=70)])),
    "several loads": result(step(rate=8), step(rate=4), step(FAILED, rate=16), step(workload="mixed")),
    "nothing answered": result(step(FAILED)),
    "an A/B test": ab_result({"a": [step()], "b": [step([sample(ttft_ms=70)])], "a again": [step()]}),
    "an A/B test without an answer": ab_result({"a": [step(FAILED)], "b": [step()], "a again": [step()]}),
}


@pytest.mark.parametrize("made", RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_every_result_can_be_drawn(made: Result | AbResult, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    plot.check(str(path))
    plot.plot(made, str(path))
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(start[suffix])


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(BenchError, match="Is a directory"):
        plot.plot(result(), str(tmp_path / "a.png"))


def test_what_is_no_picture() -> None:
    with pytest.raises(WrongUsage, match=r"a\.txt: a plot ends in \.png, \.svg, \.pdf"):
        plot.check("a.txt")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WrongUsage, match="pip install matplotlib"):
        plot.check("a.png")
