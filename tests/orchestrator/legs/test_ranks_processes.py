"""Data-parallel engines for real: hand-offs from rank to rank, through one process and through several."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

RANKS = 2
LATENCY = ["--prefill-us-per-token", "100"]  # so that a cache is worth more than any noise


def ledger(worker: SimWorker) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{worker.url}/sim/ledger", trust_env=False).json()
    return found


def ask(client: httpx.Client, text: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 3}
    return client.post("/v1/chat/completions", json=body)


def is_drained(prefill: SimWorker, client: httpx.Client) -> bool:
    """Rank 0 would get what is its own, if it got anything."""
    assert all(ask(client, f"x {number}").status_code == 200 for number in range(4))
    return {entry["rank"] for entry in ledger(prefill)["requests"][-4:]} == {1}


@pytest.mark.parametrize("processes", [1, 2])
def test_conversations_stay_with_an_engine_and_hand_over_to_any(tmp_path: Path, processes: int) -> None:
    with (
        simulated("prefill", "decode", options=["--data-parallel-size", str(RANKS), *LATENCY]) as workers,
        starting(tmp_path, workers) as start,
    ):
        orchestrator = start(
            processes=processes,
            routing={"prefill": "prefix", "decode": "round_robin"},
            pool={"data_parallel_size": RANKS},
        )
        assert sorted(orchestrator.worker_states()) == [
            f"{MODEL}/{role}/0.dp{rank}" for role in ("decode", "prefill") for rank in range(RANKS)
        ]
        client = orchestrator.client_of_each()[0]
        texts = [f"conversation {number}: " + "hi " * 2000 for number in range(4)]
        for text in [*texts, *texts, *texts]:
            answer = ask(client, text)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-baton-path"] == "disaggregated"
        prefill, decode = workers
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 1000  # the last of them was in the cache of its rank
        asked = [entry for entry in ledger(prefill)["requests"] if entry["leg"] == "prefill"]
        ranks = [entry["rank"] for entry in asked]
        assert ranks[:4] == ranks[4:8] == ranks[8:]
        assert set(ranks) == {0, 1}
        decoded = Counter(entry["rank"] for entry in ledger(decode)["requests"] if entry["leg"] == "decode")
        assert decoded == {0: 6, 1: 6}
        for engine in (ledger(prefill), *ledger(prefill)["others"]):
            assert engine["pulled"] == engine["pinned"] > 0

        orchestrator.change("POST", f"/admin/workers/{MODEL}/prefill/0.dp0/drain")
        assert orchestrator.worker_states()[f"{MODEL}/prefill/0.dp1"] == "ready"
        before = len(ledger(prefill)["requests"])
        for one in orchestrator.client_of_each():
            wait_for(lambda one=one: is_drained(prefill, one), "that this rank gets nothing")
        assert len(ledger(prefill)["requests"]) > before
