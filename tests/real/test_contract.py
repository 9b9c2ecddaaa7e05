"""The contract between orchestrator and worker, over real vLLM: the cases of the simulated engine."""

from __future__ import annotations

import pytest

from tests.contract.cases import *  # noqa: F403  # the cases are the tests
from tests.contract.engines import Engine
from tests.real.conftest import Cluster


@pytest.fixture(scope="module")
def engine(mixed: Cluster) -> Engine:
    """Its decode worker is plain vLLM."""
    return Engine(mixed.prefill, mixed.decode, "tiny-chat")
