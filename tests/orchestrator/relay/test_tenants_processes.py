"""API keys beside one another, with real processes and simulated workers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

FLOOD = 24  # clients of the one that floods


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", options=["--decode-ms-per-token", "10"]) as made:
        yield made


class Site:
    """An orchestrator with a keys file."""

    def __init__(
        self, directory: Path, workers: list[SimWorker], keys: dict[str, str], **options: Any
    ) -> None:
        self.file = directory / "keys"
        self.write({"root": "admin,infer,metrics", **keys})
        self.orchestrator = Orchestrator(
            directory, workers, key="root", api_keys_file=str(self.file), **options
        )
        self.orchestrator.wait_ready()

    def write(self, keys: dict[str, str]) -> None:
        lines = [f"{name} {sha256(name.encode()).hexdigest()} {words}\n" for name, words in keys.items()]
        self.file.write_text("".join(lines))

    def reload(self) -> httpx.Response:
        url = f"{self.orchestrator.admin_url}/admin/reload"
        return httpx.post(url, headers={"authorization": "Bearer root"}, timeout=60, trust_env=False)

    def client(self, name: str) -> httpx.Client:
        client = self.orchestrator.client()
        client.headers["authorization"] = f"Bearer {name}"
        return client

    def counted(self, what: str, **labels: str) -> float:
        return self.orchestrator.counters().get((f"baton_key_{what}_total", tuple(sorted(labels.items()))), 0)


@pytest.fixture
def make(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Any]:
    made: list[Site] = []

    def site(keys: dict[str, str], **options: Any) -> Site:
        made.append(Site(tmp_path, workers, keys, **options))
        return made[-1]

    yield site
    for one in made:
        one.orchestrator.clean_up()


def ask(client: httpx.Client, tokens: int) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Go on", "max_tokens": tokens, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_flood_of_one_key_leaves_a_quiet_one_all_that_it_asks_for(make: Any, processes: int) -> None:
    site: Site = make(
        {"loud": "", "quiet": ""},
        processes=processes,
        seats=4 * processes,
        queue={"requests": 6, "timeout_s": 10},
    )
    is_over = threading.Event()
    loud: Counter[int] = Counter()

    def flood() -> None:
        client = site.client("loud")
        while not is_over.is_set():
            loud[ask(client, 50).status_code] += 1
            time.sleep(0.02)

    with ThreadPoolExecutor(FLOOD + 1) as threads:
        flooding = [threads.submit(flood) for _ in range(FLOOD)]
        try:
            wait_for(lambda: loud[429] > 20, "the flood")
            clients = [site.client("quiet") for _ in range(3)]
            statuses = [ask(client, 5).status_code for client in clients * 6]
        finally:
            is_over.set()
        for one in flooding:
            one.result()
    assert statuses == [200] * 18
    assert site.counted("requests", key="quiet") == 18
    assert site.counted("tokens", key="quiet") >= 18 * 5
    rejected = {
        reason: site.counted("requests_rejected", key="loud", reason=reason)
        for reason in ("queue_full", "too_late", "over_share")
    }
    assert sum(rejected.values()) == loud[429]
    wait_for(lambda: " of key loud (" in site.orchestrator.lines, "the warning")
    assert "requests were refused in the last" in site.orchestrator.lines
    assert " of key quiet (" not in site.orchestrator.lines
    events = site.orchestrator.admin("/admin/events").json()
    assert any(one["kind"] == "request.rejected" and one["who"] == "key loud" for one in events)


def test_the_limits_of_a_key_hold_for_all_processes_together(make: Any) -> None:
    site: Site = make({"a": "rpm=20", "b": "concurrency=2"}, processes=2)
    clients = site.orchestrator.client_of_each()
    for client in clients:
        client.headers["authorization"] = "Bearer a"
    answers = [ask(client, 1) for client in clients * 15]
    statuses = Counter(answer.status_code for answer in answers)
    flowed_in = 20 / 60 * (sum(answer.elapsed.total_seconds() for answer in answers) + 1)
    assert 20 <= statuses[200] <= 21 + flowed_in
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "19"
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "18"
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    for client in clients:
        client.headers["authorization"] = "Bearer b"
    streams = [Stream(client, 100_000) for client in clients]
    others = site.client("b")
    assert ask(others, 1).status_code == 429
    streams[0].leave()
    wait_for(lambda: ask(others, 1).status_code == 200, "one that has ended")
    streams[1].leave()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reload_changes_limits_and_one_that_is_broken_changes_nothing(make: Any, processes: int) -> None:
    site: Site = make({"a": "rpm=1"}, processes=processes)
    client = site.client("a")
    assert [ask(client, 1).status_code for _ in range(2)] == [200, 429]
    site.write({"root": "admin,infer", "a": "rpm=one"})
    answer = site.reload()
    assert answer.status_code == 409
    assert f"{site.file}:2: rpm (requests per minute) is a whole number" in answer.text
    assert ask(client, 1).status_code == 429
    site.write({"root": "admin,infer", "a": ""})
    assert site.reload().json() == {"changed": ["orchestrator.api_keys_file"]}
    wait_for(lambda: ask(client, 1).status_code == 200, "the new limits")
    site.orchestrator.config["orchestrator"]["tenants"] = {"rpm": 1}
    site.orchestrator.write_config()
    assert site.reload().json() == {"changed": ["orchestrator.tenants.rpm"]}
    wait_for(lambda: ask(client, 1).status_code == 429, "the limit of all keys")
