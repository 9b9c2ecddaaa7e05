"""Tokenising once over real vLLM: both legs by hand, in every form, and what is refused."""

from __future__ import annotations

import pytest

from tests.contract.engines import Engine
from tests.contract.token_id_cases import *  # noqa: F403  # the cases are tests
from tests.contract.token_id_cases import Legs
from tests.real.conftest import Cluster


@pytest.fixture(scope="module", params=["list", "base64", "bin"])
def legs(request: pytest.FixtureRequest, cluster: Cluster) -> Legs:
    return Legs(Engine(cluster.prefill, cluster.decode, "tiny-chat"), request.param)


@pytest.fixture(scope="module")
def taker(cluster: Cluster) -> Legs:
    return Legs(Engine(cluster.prefill, cluster.decode, "tiny-chat"), "bin")
