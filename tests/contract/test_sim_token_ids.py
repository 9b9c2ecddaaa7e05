"""The simulated engine keeps the contract of tokenising once, with each transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.contract.engines import Engine
from tests.contract.token_id_cases import *  # noqa: F403  # the tests themselves
from tests.contract.token_id_cases import Legs
from tests.worker.sim.workers import MODEL, running

GIVEN = {"json": ["list"], "orjson": ["list", "base64"], "msgpack": ["list", "base64", "bin"]}


@contextmanager
def pair(transport: str) -> Iterator[Engine]:
    with (
        running(role="prefill", transport=transport, max_model_len=4096) as prefiller,
        running(role="decode", transport=transport, max_model_len=4096) as decoder,
    ):
        yield Engine(prefiller.url, decoder.url, MODEL)


@pytest.fixture(
    scope="module", params=[(transport, form) for transport in GIVEN for form in GIVEN[transport]]
)
def legs(request: pytest.FixtureRequest) -> Iterator[Legs]:
    transport, form = request.param
    with pair(transport) as engine:
        yield Legs(engine, form)


@pytest.fixture(scope="module")
def taker() -> Iterator[Legs]:
    with pair("msgpack") as engine:
        yield Legs(engine, "bin")
