"""The simulated engine keeps the contract of embeddings, and so does the orchestrator before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.shared.processes import free_port
from tests.baton import baton
from tests.contract.embedding_cases import *  # noqa: F403  # the tests themselves
from tests.contract.embedding_cases import Embedder
from tests.worker.sim.workers import MODEL, running

CONFIG = """
orchestrator: {{listen: "127.0.0.1:{port}", admin: null}}
models: [{{name: {model}, both: {{urls: ["{url}"]}}}}]
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[Embedder]:
    with running() as sim:
        yield Embedder(sim.url, MODEL)


@pytest.fixture(scope="module")
def front(worker: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    folder, port = tmp_path_factory.mktemp("orchestrator"), free_port()
    config = Path(folder, "config.yaml")
    config.write_text(CONFIG.format(port=port, model=MODEL, url=worker.url))
    url = f"http://127.0.0.1:{port}"
    with baton("orchestrator", str(config), cwd=folder, transport="msgpack", ready_at=f"{url}/ready"):
        yield Embedder(url, MODEL)


@pytest.fixture(scope="module", params=["worker", pytest.param("front", marks=pytest.mark.processes)])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    embedder: Embedder = request.getfixturevalue(request.param)
    return embedder
