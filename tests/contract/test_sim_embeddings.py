"""The simulated engine keeps the contract of embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.embedding_cases import *  # noqa: F403  # the tests themselves
from tests.contract.embedding_cases import Embedder
from tests.worker.sim.workers import MODEL, running


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with running() as worker:
        yield Embedder(worker.url, MODEL)
