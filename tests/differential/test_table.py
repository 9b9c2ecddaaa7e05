"""The table of cases and that of rightful differences fit each other."""

from __future__ import annotations

from collections import Counter

from tests.differential.cases import CASES
from tests.differential.rightful import NAMED


def test_every_case_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_every_rightful_difference_occurs_in_a_case() -> None:
    assert {name for case in CASES for name in case.differs} == NAMED.keys()


def test_there_are_hundreds_of_cases_on_either_engine() -> None:
    for engine in ("sim", "real"):
        assert sum(case.only in ("", engine) for case in CASES) >= 450
