"""What routing knows of caches, with workers and orchestrators that are processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

PACE = ["--prefill-us-per-token", "20"]  # so that workers differ little in what they seem to be worth


@contextlib.contextmanager
def workers(*options: list[str]) -> Iterator[list[SimWorker]]:
    """Prefill workers with these options, and a decode worker; ready."""
    made = [*(SimWorker("prefill", [*PACE, *each]) for each in options), SimWorker("decode", [])]
    try:
        for worker in made:
            worker.wait_ready()
        yield made
    finally:
        for worker in made:
            worker.kill()


def talk(client: httpx.Client, chat: int, turn: int) -> int:
    """Ask the turn of a conversation, which begins with a long text; return how many tokens were cached."""
    messages = [
        {
            "role": "user" if each % 2 == 0 else "assistant",
            "content": f"chat {chat} part {each} " * (60 if each else 600),
        }
        for each in range(2 * turn + 1)
    ]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def caches(front: Orchestrator) -> dict[str, Any]:
    found = front.admin("/admin/workers").json()
    return {each["address"]["name"]: each["cache"] for each in found if each["cache"] is not None}


def states(front: Orchestrator) -> list[str | None]:
    return [(cache["kv_events"] or {}).get("state") for cache in caches(front).values()]


def heard(front: Orchestrator) -> int:
    """How many batches of KV events were, over all processes."""
    return sum(cache["kv_events"]["batches"] for cache in caches(front).values())


@pytest.mark.parametrize("processes", [1, 2])
def test_kv_events_are_heard_by_all_processes(tmp_path: Path, processes: int) -> None:
    endpoints = [[f"ipc://{tmp_path}/{name}{index}" for name in ("kv", "again")] for index in range(2)]
    options = [["--kv-events", kv, "--kv-events-replay", again] for kv, again in endpoints]
    with workers(*options) as made, starting(tmp_path, made) as start:
        front = start(processes=processes, routing={"prefill": "kv_events"})
        wait_for(lambda: states(front) == ["followed"] * 2, "all events to be heard")
        clients = front.client_of_each()
        for chat in range(6):
            cached = [talk(clients[chat % processes], chat, turn) for turn in range(3)]
            assert cached[0] < 64 <= cached[1] < cached[2]
        wait_for(lambda: heard(front) == 18 * processes, "a batch of each prefill in each process")
        for worker in made[:2]:
            assert httpx.post(f"{worker.url}/sim/reset_prefix_cache").json() == {"success": True}
        wait_for(lambda: heard(front) == 20 * processes, "the news that caches are empty")
        cached = [talk(clients[chat % processes], chat, 3) for chat in range(6)]
        assert cached[0] < 64
        wait_for(lambda: heard(front) == 26 * processes, "the figures of all that")
        assert front.gauge("baton_kv_events_followed") == 2
        # What had been sent was not expected any more.
        assert front.gauge("baton_prefix_missed_ratio") < 0.1
        made[1].kill()
        wait_for(lambda: sorted(map(str, states(front))) == ["approximate", "followed"], "its silence")
        wait_for(lambda: front.lines.count("KV events are missing") == 1, "the log to say so")


def test_workers_without_events_are_told_of_and_routed_to_as_by_prefix(tmp_path: Path) -> None:
    with workers([], []) as made, starting(tmp_path, made) as start:
        front = start(processes=1, routing={"prefill": "kv_events"})
        wait_for(lambda: states(front) == ["approximate"] * 2, "their absence to be seen")
        assert [talk(front.client(), 1, turn) >= 64 for turn in range(3)] == [False, True, True]
        wait_for(lambda: front.lines.count("KV events are missing") == 2, "the log to say so")


@pytest.mark.parametrize("processes", [1, 2])
def test_without_caches_the_alarm_is_raised_and_nothing_is_lost(tmp_path: Path, processes: int) -> None:
    off = ["--no-prefix-caching"]
    with workers(off, off) as made, starting(tmp_path, made) as start:
        routing = {"prefill": {"policy": "prefix", "drift_s": 0}}
        front = start(processes=processes, routing=routing)
        assert front.gauge("baton_prefix_trusted") == 0  # nothing is known, so nothing is told
        for client in front.client_of_each():
            for turn in range(80):
                assert talk(client, turn % 2, turn % 3) == 0
        wait_for(lambda: any(not each["is_trusted"] for each in caches(front).values()), "the alarm")
        distrusted = [cache for cache in caches(front).values() if not cache["is_trusted"]]
        assert all(cache["missed_ratio"] == 1.0 for cache in distrusted)
        assert all(cache["prediction_error"] > 0.5 for cache in distrusted)
        wait_for(lambda: front.lines.count("were not there of late") == len(distrusted), "the log to say so")
