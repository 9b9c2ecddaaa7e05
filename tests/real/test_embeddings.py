"""Embeddings of real vLLM: the worker keeps the contract, and so does the orchestrator before it."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest

from tests.baton import ROOT, baton
from tests.contract.embedding_cases import *  # noqa: F403  # the cases are tests
from tests.contract.embedding_cases import Embedder, of_base64
from tests.real.conftest import Cluster, Stage, free_base

CONFIG = ROOT / "configs/embeddings.yaml"
MODEL = "tiny-embed"
OCTETS = "application/octet-stream"
_salts = map(str, itertools.count())


@contextlib.contextmanager
def embedding_cluster(folder: Path) -> Iterator[Cluster]:
    """The config that is shipped, on free ports."""
    base = free_base()
    settings = {
        "orchestrator.listen": f"127.0.0.1:{base + 10}",
        "orchestrator.admin": f"127.0.0.1:{base + 11}",
        "base_port": base,
    }
    argv = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with baton("up", str(CONFIG), *argv, cwd=folder, transport="msgpack") as front:
        worker = f"http://127.0.0.1:{base}"
        yield Cluster(CONFIG, front, f"http://127.0.0.1:{base + 11}", worker, worker)


@pytest.fixture(scope="module")
def embedding(stage: Stage) -> Cluster:
    return stage.show("embedding", embedding_cluster)


@pytest.fixture(scope="module")
def front(embedding: Cluster) -> Embedder:
    return Embedder(embedding.front, MODEL)


@pytest.fixture(scope="module", params=["worker", "orchestrator"])
def embedder(request: pytest.FixtureRequest, embedding: Cluster, front: Embedder) -> Embedder:
    return front if request.param == "orchestrator" else Embedder(embedding.decode, MODEL)


def ask(embedder: Embedder, **options: Any) -> httpx.Response:
    """One input, of which no prefix is cached: it is computed in the same way each time."""
    answer = embedder.ask("What is prefill?", cache_salt=next(_salts), **options)
    assert answer.status_code == 200, answer.text
    return answer


def test_all_forms_are_the_same_numbers(front: Embedder) -> None:
    expected = of_base64(ask(front, encoding_format="base64"))
    floats = ask(front).json()["data"][0]["embedding"]
    assert numpy.array(floats, "<f4").tobytes() == expected
    for encoding in ("bytes", "bytes_only"):
        assert ask(front, encoding_format=encoding).content == expected
    raw = ask(front, accept=OCTETS)
    assert raw.content == expected
    assert json.loads(raw.headers["x-baton-embeddings"])["shape"] == [1, len(floats)]


def test_the_orchestrators_numbers_are_the_workers(front: Embedder, embedding: Cluster) -> None:
    theirs, ours = ask(Embedder(embedding.decode, MODEL)).json(), ask(front).json()
    assert ours["data"] == theirs["data"]
    assert ours["usage"] == theirs["usage"]


def test_a_large_batch_is_made_in_another_process(front: Embedder) -> None:
    inputs = [f"Question {number}" for number in range(200)]
    answer = front.ask(inputs)
    assert len(answer.json()["data"]) == 200
    raw = front.ask(inputs, accept=OCTETS)
    summary = json.loads(raw.headers["x-baton-embeddings"])
    assert summary["shape"] == [200, len(answer.json()["data"][0]["embedding"])]
    assert len(raw.content) == 4 * numpy.prod(summary["shape"])
    floats = numpy.array([item["embedding"] for item in answer.json()["data"]], "f4")
    assert numpy.allclose(numpy.frombuffer(raw.content, "<f4").reshape(floats.shape), floats, atol=1e-5)


def test_it_says_who_served_it(front: Embedder) -> None:
    assert front.ask().headers["x-baton-path"] == "aggregated"
