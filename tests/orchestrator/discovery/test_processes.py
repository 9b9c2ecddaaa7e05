"""Real orchestrators, of one process or several, whose workers are members in a folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.wire.info import Role
from orchestrator.wire.member import Member, remove_member, write_member
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.orchestrator.workers.test_rolling_restart import CLIENTS, WORK, Load, pins
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

ROLES: tuple[Role, ...] = ("prefill", "decode")
HUNDREDS = 300  # at addresses where nobody is


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with simulated(*ROLES, *ROLES, options=WORK) as made:
        yield made


Start = Callable[[int], Orchestrator]


@pytest.fixture
def start(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Start]:
    """Start an orchestrator of so many processes, of whose workers the first two are listed."""
    place(tmp_path, workers[0], "0", "first")
    place(tmp_path, workers[1], "0", "first")
    pool = {"discover": {"file": str(members(tmp_path))}}
    with starting(tmp_path, workers) as begin:
        yield lambda processes: begin(processes=processes, pool=pool)


def members(tmp_path: Path) -> Path:
    return tmp_path / "members"


def place(tmp_path: Path, worker: SimWorker, name: str, start: str) -> None:
    role: Role = "prefill" if worker.role == "prefill" else "decode"
    uid = f"{role}.{name}.{start}"
    write_member(members(tmp_path), Member(uid=uid, name=name, model=MODEL, role=role, url=worker.url))


def is_ready(orchestrator: Orchestrator, name: str) -> bool:
    return orchestrator.worker_states().get(f"{MODEL}/{name}") == "ready"


@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"])
def test_workers_that_follow_each_other_under_load_fail_no_request(
    processes: int, start: Start, tmp_path: Path, workers: list[SimWorker]
) -> None:
    orchestrator = start(processes)
    with Load(orchestrator) as load:
        for role, old, new in (("prefill", workers[0], workers[2]), ("decode", workers[1], workers[3])):
            load.wait_more(CLIENTS)
            place(tmp_path, new, "1", "first")
            wait_for(lambda role=role: is_ready(orchestrator, f"{role}/1"), f"{role}/1")
            load.wait_more(CLIENTS)
            remove_member(members(tmp_path), f"{role}.0.first")
            wait_for(
                lambda role=role: f"{MODEL}/{role}/0" not in orchestrator.worker_states(), f"{role}/0 to go"
            )
            wait_for(lambda old=old: not pins(old), "what it has prefilled to be pulled")
            old.kill()
            load.wait_more(CLIENTS)
    assert load.failures == []
    kinds = {event["kind"] for event in orchestrator.admin("/admin/events").json()}
    assert "discovery.changed" in kinds
    (source,) = orchestrator.admin("/admin/discovery").json()
    assert source["pools"] == [f"{MODEL}/prefill", f"{MODEL}/decode"]
    assert (source["members"], source["away"], source["problems"]) == (2, None, [])
    assert "baton_discovery_age_seconds{model=" in orchestrator.admin("/metrics").text


def test_hundreds_find_room_and_one_that_starts_anew_is_another_one(
    start: Start, tmp_path: Path, workers: list[SimWorker]
) -> None:
    orchestrator = start(2)
    for index in range(HUNDREDS):
        url = f"http://127.0.{1 + index // 200}.{1 + index % 200}:9"
        member = Member(uid=f"u{index}", name=f"n{index}", model=MODEL, role="decode", url=url)
        write_member(members(tmp_path), member)
    wait_for(lambda: len(orchestrator.worker_states()) == 2 + HUNDREDS, "all members")
    place(tmp_path, workers[3], "0", "second")  # elsewhere, under the old name
    wait_for(lambda: is_ready(orchestrator, "decode/0"), "the second start")
    workers[1].kill()
    body = {"model": MODEL, "prompt": "Go on", "max_tokens": 3}
    for client in orchestrator.client_of_each():  # each process hears of it from the supervisor
        wait_for(lambda: client.post("/v1/completions", json=body).status_code == 200, "the second start")  # noqa: B023
    for index in range(HUNDREDS):
        remove_member_named(tmp_path, f"n{index}")
    wait_for(lambda: len(orchestrator.worker_states()) == 2, "those that are listed")


def remove_member_named(tmp_path: Path, name: str) -> None:
    next(members(tmp_path).glob(f"*%2F{name}.json")).unlink()


def test_a_reload_may_name_another_source(start: Start, tmp_path: Path, workers: list[SimWorker]) -> None:
    orchestrator = start(2)
    other = tmp_path / "others.json"
    listed = [
        {"uid": f"x{index}", "name": "other", "model": MODEL, "role": worker.role, "url": worker.url}
        for index, worker in enumerate(workers[2:])
    ]
    other.write_text(json.dumps(listed))
    for role in ROLES:
        orchestrator.config["models"][0][role]["discover"] = {"file": str(other)}
    orchestrator.write_config()
    orchestrator.change("POST", "/admin/reload")
    wait_for(
        lambda: set(orchestrator.worker_states()) == {f"{MODEL}/prefill/other", f"{MODEL}/decode/other"},
        "others",
    )
    wait_for(
        lambda: is_ready(orchestrator, "prefill/other") and is_ready(orchestrator, "decode/other"), "them"
    )
    with httpx.Client(base_url=orchestrator.url, trust_env=False) as client:
        body = {"model": MODEL, "prompt": "Go on", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"])
def test_a_fifo_in_the_folder_holds_up_neither_changes_nor_the_end(
    processes: int, start: Start, tmp_path: Path, workers: list[SimWorker]
) -> None:
    os.mkfifo(members(tmp_path) / "f.json")
    orchestrator = start(processes)
    (source,) = orchestrator.admin("/admin/discovery").json()
    assert source["problems"] == ["f.json: it is passed over: Is a FIFO, not a file"]
    place(tmp_path, workers[3], "1", "first")
    wait_for(lambda: is_ready(orchestrator, "decode/1"), "decode/1")
    remove_member(members(tmp_path), "decode.1.first")
    wait_for(lambda: f"{MODEL}/decode/1" not in orchestrator.worker_states(), "decode/1 to go")
    orchestrator.signal(signal.SIGINT)
    assert orchestrator.wait_exit() == 0
