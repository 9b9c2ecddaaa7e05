"""The contract over the simulated engine; over other workers with

    BATON_CONTRACT_ENGINE='PREFILL_URL DECODE_URL MODEL' pytest tests/contract

and from any other folder of tests: a fixture `engine`, and `from tests.contract.cases import *`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite(
    "tests.contract.cases",
    "tests.contract.embedding_cases",
    "tests.contract.engines",
    "tests.contract.messages_cases",
    "tests.contract.responses_cases",
    "tests.contract.shapes",
    "tests.contract.token_id_cases",
)

from tests.contract.engines import Engine  # noqa: E402  # after its asserts are known to be rewritten
from tests.worker.sim.workers import MODEL, running  # noqa: E402


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    if given := os.environ.get("BATON_CONTRACT_ENGINE"):
        yield Engine(*given.split())
        return
    with (
        running(role="prefill", max_model_len=4096) as prefiller,
        running(role="decode", max_model_len=4096) as decoder,
    ):
        yield Engine(prefiller.url, decoder.url, MODEL)
