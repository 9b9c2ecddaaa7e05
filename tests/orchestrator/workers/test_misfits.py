"""A worker that cannot hand over to the others is kept out by real processes, and they say why."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("processes", [1, 2])
def test_requests_go_to_those_that_fit(tmp_path: Path, processes: int) -> None:
    with (
        simulated("prefill", "decode") as right,
        simulated("decode", options=["--dtype", "float32"]) as wrong,
        starting(tmp_path, [*right, *wrong]) as start,
    ):
        orchestrator: Orchestrator = start(processes=processes)
        wait_for(lambda: orchestrator.worker_states()[f"{MODEL}/decode/1"] == "unfit", "the refusal")
        ask = {"model": MODEL, "prompt": "Who?", "max_tokens": 2}
        client = orchestrator.client()
        for _ in range(6):
            answer = client.post("/v1/completions", json=ask)
            assert (answer.status_code, answer.headers["x-baton-kv"]) == (200, "transferred")
        (refused,) = (w for w in orchestrator.admin("/admin/workers").json() if w["state"] == "unfit")
        misfit = r"its dtype is 'float32', that of m/(prefill|decode)/0 is 'bfloat16': "  # who was up before
        assert re.match(misfit, refused["last_error"])
        assert refused["reason"] == "does not fit the other workers (dtype)"
        said = client.get("/ready").text
        assert "m/decode/1" in said
        assert "float32" not in said  # everybody may read it
    assert "give both the same --dtype" in orchestrator.lines


def test_a_pair_that_does_not_fit_is_not_ready_and_says_so(tmp_path: Path) -> None:
    with simulated("prefill") as prefill, simulated("decode", options=["--block-size", "32"]) as decode:
        orchestrator = Orchestrator(tmp_path, [*prefill, *decode], processes=1)
        try:
            wait_for(
                lambda: "does not fit the other workers (block_size)" in reasons(orchestrator), "a reason"
            )
            assert sorted(orchestrator.worker_states().values()) == ["ready", "unfit"]
        finally:
            orchestrator.clean_up()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_is_added_under_the_wrong_role_is_refused_and_named(
    tmp_path: Path, processes: int
) -> None:
    with (
        simulated("prefill", "decode") as right,
        simulated("prefill") as (wrong,),
        starting(tmp_path, right) as start,
    ):
        orchestrator: Orchestrator = start(processes=processes)
        new = {"model": MODEL, "role": "decode", "url": wrong.url}
        httpx.post(f"{orchestrator.admin_url}/admin/workers", json=new, trust_env=False).raise_for_status()
        name = f"{MODEL}/decode/1"
        wait_for(lambda: orchestrator.worker_states()[name] == "unfit", "the refusal")
        (refused,) = (w for w in orchestrator.admin("/admin/workers").json() if w["state"] == "unfit")
        assert (refused["address"]["name"], refused["reason"]) == (name, "has another role")
        said = "it announces the role 'prefill', and its pool is 'decode': "
        assert refused["last_error"].startswith(said)
        events = orchestrator.admin("/admin/events?kind=worker.unfit").json()
        assert [event["subject"] for event in events] == [name]
        assert said in events[0]["message"]
        assert "unfit: it has another role" in orchestrator.client().get("/ready").text


def reasons(orchestrator: Orchestrator) -> str:
    """What /admin/workers gives as reasons; nothing while nobody listens."""
    try:
        return " ".join(str(worker["reason"]) for worker in orchestrator.admin("/admin/workers").json())
    except httpx.TransportError:
        return ""
