"""One process or several: what each worker does is counted over all of them, and a slow one is found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

FAST_MS, SLOW_MS = 2, 60


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    """A prefill worker and three decode workers, the last of which is much slower."""
    with contextlib.ExitStack() as stack:
        fast = stack.enter_context(
            simulated("prefill", "decode", "decode", options=["--decode-ms-per-token", str(FAST_MS)])
        )
        slow = stack.enter_context(simulated("decode", options=["--decode-ms-per-token", str(SLOW_MS)]))
        yield [*fast, *slow]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def orchestrator(
    request: pytest.FixtureRequest, tmp_path: Path, workers: list[SimWorker]
) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=request.param, routing={"decode": "round_robin"})


def serve(orchestrator: Orchestrator, requests: int) -> None:
    """Streams, a few at a time."""
    body = {"model": MODEL, "prompt": "Go on", "max_tokens": 10, "ignore_eos": True, "stream": True}
    client = orchestrator.client()
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: client.post("/v1/completions", json=body), range(requests)):
            assert answer.status_code == 200


def rows(orchestrator: Orchestrator) -> dict[str, Any]:
    return {row["address"]["name"]: row for row in orchestrator.admin("/admin/workers").json()}


def kinds(orchestrator: Orchestrator, subject: str) -> list[str]:
    events = orchestrator.admin("/admin/events").json()
    return [event["kind"] for event in events if event.get("subject") == subject]


def test_a_slow_worker_is_found_and_ejected_if_that_is_wanted(orchestrator: Orchestrator) -> None:
    slow = f"{MODEL}/decode/2"

    def is_told() -> bool:
        serve(orchestrator, 18)
        return "worker.slow" in kinds(orchestrator, slow)

    wait_for(is_told, "the event of a slow worker")
    found = rows(orchestrator)
    assert found[slow]["is_slow"]
    assert found[slow]["inter_token_p50"] > 2 * found[f"{MODEL}/decode/0"]["inter_token_p50"]
    served = [found[f"{MODEL}/decode/{index}"]["served"] for index in range(3)]
    assert found[f"{MODEL}/prefill/0"]["served"] == sum(served)
    assert f'baton_worker_slow{{model="{MODEL}",role="decode",worker="{slow}"}} 1.0' in (
        orchestrator.admin("/metrics").text
    )
    orchestrator.config["health"] = {"slow_outlier": "off"}
    orchestrator.write_config()
    orchestrator.change("POST", "/admin/reload")
    wait_for(lambda: not rows(orchestrator)[slow]["is_slow"], "nobody to be judged")
    orchestrator.config["health"] = {"slow_outlier": "eject", "eject_s": 30.0}
    orchestrator.write_config()
    orchestrator.change("POST", "/admin/reload")

    def is_ejected() -> bool:
        serve(orchestrator, 18)
        return rows(orchestrator)[slow]["state"] == "ejected"

    wait_for(is_ejected, "the slow worker to be ejected")
    states = [row["state"] for row in rows(orchestrator).values()]
    assert states.count("ejected") == 1
