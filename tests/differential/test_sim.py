"""Baton answers as a worker does: over the simulated engine."""

from __future__ import annotations

import pytest

from tests.differential.case import Case
from tests.differential.cases import CASES
from tests.differential.compare import Pair

pytestmark = pytest.mark.processes

HERE = [case for case in CASES if case.only != "real"]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_an_answer_is_a_workers(pair: Pair, case: Case) -> None:
    pair.check(case)
