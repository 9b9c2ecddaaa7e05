"""What is the simulated engine's own; the forms of answers are the contract's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy
import pytest

from tests.waiting import wait_for
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.embeddings import DIMENSIONS, vectors_of

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def _worker() -> Iterator[Worker]:
    with running(record=10) as worker:
        yield worker


@pytest.fixture
def worker(_worker: Worker) -> Iterator[Worker]:
    yield _worker
    _worker.client.delete("/sim/faults")
    assert _worker.ledger()["in_flight"] == 0
    assert _worker.ledger()["blocks_used"] == 0


def embed(worker: Worker, given: Any, **fields: Any) -> httpx.Response:
    return worker.post(PATH, {"model": MODEL, "input": given} | fields)


def vectors(answer: httpx.Response) -> numpy.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return numpy.array([item["embedding"] for item in answer.json()["data"]], "f4")


def outcome(worker: Worker) -> str:
    return str(worker.ledger()["requests"][-1]["outcome"])


def test_vectors_are_those_of_the_prompt(worker: Worker) -> None:
    found = vectors(embed(worker, ["a", "b", "a"]))
    assert found.shape == (3, DIMENSIONS)
    assert (found[0] == found[2]).all()
    assert (found[0] != found[1]).any()
    assert (found == vectors(embed(worker, ["a", "b", "a"]))).all()


def test_fewer_dimensions_point_the_same_way(worker: Worker) -> None:
    whole, short = vectors(embed(worker, "a"))[0], vectors(embed(worker, "a", dimensions=8))[0]
    assert short.shape == (8,)
    assert numpy.allclose(short, whole[:8] / numpy.linalg.norm(whole[:8]))


@pytest.mark.parametrize("dimensions", [0, -1, DIMENSIONS + 1])
def test_dimensions_out_of_range_are_refused(worker: Worker, dimensions: int) -> None:
    answer = embed(worker, "a", dimensions=dimensions)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"


def test_an_unknown_model_is_refused(worker: Worker) -> None:
    assert embed(worker, "a", model="other").status_code == 404


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with running(max_model_len=8) as worker:
        assert "maximum context length" in embed(worker, [1] * 9).json()["error"]["message"]


def test_usage_counts_every_input(worker: Worker) -> None:
    assert embed(worker, [[1, 2, 3], [4]]).json()["usage"]["prompt_tokens"] == 4


def test_it_is_journaled_like_every_request(worker: Worker) -> None:
    answer = embed(worker, "a")
    entry = worker.ledger()["requests"][-1]
    assert (entry["path"], entry["leg"], entry["outcome"]) == (PATH, "aggregated", "done")
    assert entry["id"] == answer.json()["id"]


def test_a_repeated_prompt_is_in_the_cache(worker: Worker) -> None:
    hits = worker.metric("vllm:prefix_cache_hits_total")
    for _ in range(2):
        embed(worker, "The quick brown fox jumps over the lazy dog. " * 10)
    assert worker.metric("vllm:prefix_cache_hits_total") > hits


def test_errors_strike_embeddings_too(worker: Worker) -> None:
    worker.add_fault("error", status=503, count=1, retry_after=7)
    answer = embed(worker, "a")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert outcome(worker) == "fault: error"


@pytest.mark.parametrize("encoding", ["float", "bytes"])
def test_answers_are_cut_short(worker: Worker, encoding: str) -> None:
    whole = embed(worker, "a", encoding_format=encoding)
    worker.add_fault("truncate", at_token=1, count=1)
    cut = embed(worker, "a", encoding_format=encoding)
    assert cut.status_code == 200
    assert cut.headers["content-type"] == whole.headers["content-type"]
    assert len(cut.content) < len(whole.content)
    worker.add_fault("reset", at_token=1, count=1)
    with pytest.raises(httpx.TransportError):
        embed(worker, "a", encoding_format=encoding)


def test_a_client_that_leaves_ends_it() -> None:
    with running() as worker:
        worker.add_fault("slow", seconds=600)
        with pytest.raises(httpx.ReadTimeout):
            worker.client.post(PATH, json={"input": "a"}, timeout=0.2)
        wait_for(lambda: outcome(worker) == "aborted", "the abort")
        assert worker.ledger()["in_flight"] == 0


def test_vectors_are_finite_and_of_length_1() -> None:
    found = vectors_of([bytes([number]) * 32 for number in range(200)], 3)
    assert found.dtype == numpy.float32
    assert numpy.allclose(numpy.linalg.norm(found, axis=1), 1, atol=1e-6)
