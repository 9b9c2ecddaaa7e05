"""Several data-parallel engines behind one server."""

from __future__ import annotations

from typing import Any

import httpx

from tests.worker.sim.asking import ask, cached_tokens, completion
from tests.worker.sim.workers import Worker, running

RANK = "x-data-parallel-rank"


def test_the_header_chooses_an_engine_with_a_cache_of_its_own() -> None:
    with running(block_size=4, data_parallel_size=2) as worker:
        document = completion("The quick brown fox jumps over the lazy dog. " * 3)
        found = [cached_tokens(ask_rank(worker, document, rank)) for rank in (0, 1, 1, 0)]
        assert [bool(cached) for cached in found] == [False, False, True, True]
        assert [entry["rank"] for entry in worker.ledger()["requests"]] == [0, 1, 1, 0]
        assert worker.metric("vllm:prefix_cache_queries_total") > 0
        (other,) = worker.ledger()["others"]
        assert other["engine_id"] != worker.ledger()["engine_id"]
        assert worker.client.get("/baton/info").json()["data_parallel_size"] == 2


def test_an_engine_that_is_not_there_is_refused_and_without_a_number_any_will_do() -> None:
    with running(data_parallel_size=2) as worker:
        for rank in (-1, 2):
            answer = ask_rank(worker, completion("Hi"), rank)
            assert answer.status_code == 400
            assert f"data_parallel_rank {rank} is out of range [0, 2)." in answer.text
        assert worker.post("/v1/completions", completion("Hi"), **{RANK: "first"}).status_code == 200
        assert ask(worker, completion("Hi")).status_code == 200


def ask_rank(worker: Worker, document: Any, rank: int) -> httpx.Response:
    return worker.post("/v1/completions", document, **{RANK: str(rank)})
