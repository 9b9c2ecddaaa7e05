from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.worker.sim.workers import Worker, running


@pytest.fixture(scope="package")
def _pair() -> Iterator[tuple[Worker, Worker]]:
    with running(role="prefill") as prefiller, running(role="decode") as decoder:
        yield prefiller, decoder


@pytest.fixture
def pair(_pair: tuple[Worker, Worker]) -> Iterator[tuple[Worker, Worker]]:
    """A prefill and a decode worker, shared by tests that leave them as they found them."""
    yield _pair
    for worker in _pair:
        worker.client.delete("/sim/faults")
        assert worker.ledger()["pins"] == []
        assert worker.ledger()["in_flight"] == 0
        assert worker.ledger()["blocks_used"] == 0


@pytest.fixture
def prefiller(pair: tuple[Worker, Worker]) -> Worker:
    return pair[0]


@pytest.fixture
def decoder(pair: tuple[Worker, Worker]) -> Worker:
    return pair[1]
