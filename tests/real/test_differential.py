"""Baton answers as a worker does: over real vLLM, the cases of the simulated engine and more."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.differential.case import Case
from tests.differential.cases import CASES
from tests.differential.compare import Pair
from tests.real.conftest import Cluster

HERE = [case for case in CASES if case.only != "sim"]


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> Iterator[Pair]:
    with httpx.Client(trust_env=False) as client:
        yield Pair(client, cluster.front, cluster.decode, "tiny-chat")


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_an_answer_is_a_workers(pair: Pair, case: Case) -> None:
    pair.check(case)
