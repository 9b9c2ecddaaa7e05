"""Short prompts go first in a prefill engine that goes by priorities, for real."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.running import MODEL, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes


def under_way(worker: SimWorker) -> int:
    count: int = httpx.get(f"{worker.url}/sim/ledger", trust_env=False).json()["in_flight"]
    return count


def test_a_short_prompt_overtakes_a_long_one_in_the_engine(tmp_path: Path) -> None:
    options = ["--prefill-us-per-token", "200", "--scheduling-policy", "priority"]
    with simulated("prefill", "decode", options=options) as workers, starting(tmp_path, workers) as start:
        client = start(processes=1, routing={"prefill_order": "shortest"}).client()
        done: list[str] = []

        def ask(name: str, words: int) -> None:
            body = {"model": MODEL, "prompt": f"{name} " * words, "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == 200
            done.append(name)

        # The first one computes for seconds; the others wait in the engine behind it. The long one is
        # overtaken by what comes within 4 s.
        asked = [("first", 30_000), ("long", 12_000), ("short", 1)]
        threads = [threading.Thread(target=ask, args=one) for one in asked]
        for count, thread in enumerate(threads, start=1):
            thread.start()
            wait_for(lambda count=count: under_way(workers[0]) >= count, "its place in the engine")
        for thread in threads:
            thread.join()
        assert done.index("short") < done.index("long")
