from __future__ import annotations

import math
from collections.abc import Mapping

from bench.shared.figures import Column, aligned, in_rounds, percentile, spread, without_nan


def test_rounds_begin_with_another_arm_each() -> None:
    asked: list[str] = []

    def sample(arm: str) -> Mapping[str, float]:
        asked.append(arm)
        return {"us": len(asked)}

    rows = in_rounds(["a", "b"], 2, sample)
    assert asked == ["a", "b", "b", "a"]
    assert rows == {"a": [{"us": 1}, {"us": 4}], "b": [{"us": 2}, {"us": 3}]}


def test_names_stand_to_the_left_and_figures_to_the_right() -> None:
    assert aligned([["name", "us"], ["a", "100"]], {"longest": "left out"}) == [
        "name      us",
        "a        100",
        "longest  left out",
    ]


def test_a_percentile_is_one_of_the_figures() -> None:
    assert [percentile([4, 1, 3, 2], share) for share in (0, 0.5, 0.99, 1)] == [1, 3, 4, 4]
    assert math.isnan(percentile([], 0.5))


def test_a_figure_that_there_is_none_of() -> None:
    assert Column("us", "us", 1).show(math.nan) == "-"
    assert without_nan({"us": math.nan, "ms": 1.0}) == {"us": None, "ms": 1.0}


def test_the_spread_has_the_digits_of_its_column() -> None:
    assert spread([2.345, 1.0], 1) == "1.0-2.3"
    assert Column("us", "us", 1).show(1234.56) == "1,234.6"
