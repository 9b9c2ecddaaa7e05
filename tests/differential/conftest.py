"""Baton in front of a simulated pair, beside a third worker that is asked straight and hears nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

pytest.register_assert_rewrite("tests.differential.compare")

from tests.differential.compare import Pair  # noqa: E402  # after its asserts are known to be rewritten
from tests.orchestrator.running import MODEL, simulated, starting  # noqa: E402

OPTIONS = ["--max-model-len", "4096"]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("differential")
    with (
        simulated("prefill", "decode", "both", options=OPTIONS) as workers,
        starting(folder, workers) as start,
    ):
        front = start(processes=1).url
        with httpx.Client(trust_env=False) as client:
            yield Pair(client, front, workers[-1].url, MODEL)
