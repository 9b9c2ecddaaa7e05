"""Several orchestrators, as processes of their own, send to the same workers, and hear of one another from
these alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

SHARES = (11, 3, 3, 3)  # of 20 clients, each of which sticks to one orchestrator
SEATS = 26  # of which about four fifths are taken then
LONG = 100_000  # tokens
ASK = {"model": MODEL, "prompt": "Go on", "max_tokens": 1}


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", "decode", options=["--decode-ms-per-token", "20"]) as made:
        yield made


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, workers: list[SimWorker]) -> Iterator[list[Orchestrator]]:
    """Orchestrators that are ready; each has half of the seats on each decode worker, if it were alone."""
    with ExitStack() as stack:
        starts = [stack.enter_context(starting(tmp_path_factory.mktemp("one"), workers)) for _ in SHARES]
        made = [start(processes=1, seats=SEATS // 2) for start in starts]
        for orchestrator in made:
            wait_for(lambda one=orchestrator: has_heard_of_all(one), "all to be heard of by the workers")
        yield made


def rows(orchestrator: Orchestrator) -> dict[str, dict[str, Any]]:
    return {row["address"]["name"]: row for row in orchestrator.admin("/admin/workers").json()}


def has_heard_of_all(orchestrator: Orchestrator) -> bool:
    reports = [row["report"] for row in rows(orchestrator).values()]
    return all(report is not None and report["senders"] == len(SHARES) for report in reports)


def others(orchestrator: Orchestrator) -> int:
    """What it knows of the others, on both decode workers."""
    found = rows(orchestrator)
    return sum(found[f"{MODEL}/decode/{index}"]["report"]["others"] for index in (0, 1))


def begun(orchestrators: list[Orchestrator], counts: tuple[int, ...]) -> list[Stream]:
    """So many streams at each, all of which have begun."""
    wanted = [one for one, count in zip(orchestrators, counts, strict=True) for _ in range(count)]
    with ThreadPoolExecutor(len(wanted)) as asking:
        return list(asking.map(lambda one: Stream(one.client(), LONG), wanted))


def test_clients_that_stick_to_one_of_four_wait_for_nobody(four: list[Orchestrator]) -> None:
    streams = begun(four, SHARES)  # one that waited for a seat would have to wait for the end of another
    try:
        for orchestrator, share in zip(four, SHARES, strict=True):
            assert sum(orchestrator.worker_loads().values()) == share  # only its own
            left = sum(SHARES) - share
            wait_for(lambda one=orchestrator, left=left: others(one) == left, "reports")
        more = begun(four, (SEATS - sum(SHARES), 0, 0, 0))  # the first one takes what the others have left
        wait_for(lambda: others(four[1]) == SEATS - SHARES[1], "reports")
        # All seats are taken; this one begins, as its orchestrator has fewer than its share.
        assert four[1].client().post("/v1/completions", json=ASK).status_code == 200
        streams += more
    finally:
        for stream in streams:
            stream.leave()
    for orchestrator in four:
        wait_for(lambda one=orchestrator: others(one) == 0, "the end of all streams")


def test_what_others_have_on_a_worker_counts(four: list[Orchestrator]) -> None:
    """One of them sends all to one worker; another one, which does not, sends its own elsewhere."""
    first, second = four[:2]
    busy, free = f"{MODEL}/decode/0", f"{MODEL}/decode/1"
    first.change("POST", f"/admin/workers/{free}/drain")
    streams = begun([first], (6,))
    try:
        wait_for(lambda: rows(second)[busy]["report"]["others"] == 6, "the report")
        streams += begun([second], (4,))
        assert {name: load for name, load in second.worker_loads().items() if load} == {free: 4}
    finally:
        for stream in streams:
            stream.leave()
        first.change("POST", f"/admin/workers/{free}/undrain")


def test_a_worker_that_drains_itself_is_sent_nothing_by_any_of_them(
    four: list[Orchestrator], workers: list[SimWorker]
) -> None:
    draining, name = workers[1].url, f"{MODEL}/decode/0"
    wait_for(lambda: all(rows(one)[name]["state"] == "ready" for one in four), "all to be ready")
    streams = begun(four, (2, 2, 2, 2))
    try:
        httpx.post(f"{draining}/baton/drain").raise_for_status()
        for orchestrator in four:
            wait_for(lambda one=orchestrator: rows(one)[name]["drains_itself"], "each to hear of it")
            assert rows(orchestrator)[name]["state"] == "draining"
            assert not rows(orchestrator)[name]["is_drained"]
            kinds = [event["kind"] for event in orchestrator.admin("/admin/events").json()]
            assert "worker.draining" in kinds
        report = httpx.get(f"{draining}/baton/ready").json()
        assert report["unaware"] == 0
        more = begun(four, (2, 2, 2, 2))
        assert httpx.get(f"{draining}/baton/ready").json()["running"] == report["running"] > 0
        streams += more
    finally:
        for stream in streams:
            stream.leave()
        httpx.post(f"{draining}/baton/undrain").raise_for_status()
    for orchestrator in four:
        wait_for(lambda one=orchestrator: rows(one)[name]["state"] == "ready", "the worker to be taken back")
        assert orchestrator.client().post("/v1/completions", json=ASK).status_code == 200


def clients_of(orchestrator: Orchestrator, shares: tuple[int, ...]) -> list[httpx.Client]:
    """Clients with a connection each, so many of them to each process."""
    left, found = list(shares), []

    def are_enough() -> bool:
        client = orchestrator.client()
        index = client.get("/health?verbose").json()["process"]
        left[index] -= 1
        found.append(client) if left[index] >= 0 else client.close()
        return max(left) <= 0

    wait_for(are_enough, "a connection of each client")
    return found


def test_processes_of_one_take_the_seats_that_the_others_leave(
    tmp_path: Path, workers: list[SimWorker]
) -> None:
    with starting(tmp_path, workers) as start:
        orchestrator = start(processes=len(SHARES), seats=SEATS // 2)
        clients = clients_of(orchestrator, SHARES)
        with ThreadPoolExecutor(len(clients)) as asking:
            streams = list(asking.map(lambda client: Stream(client, LONG), clients))
        decodes = [load for name, load in orchestrator.worker_loads().items() if "/decode/" in name]
        assert sum(decodes) == sum(SHARES)
        for stream in streams:
            stream.leave()
