"""Workers that idle leave the cores to others, and those that work get along with others that take all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.shared.processes import tree
from tests.real.ask import ANSWERS, chat, completion, post, text_of
from tests.real.conftest import Cluster, metric, samples
from tests.real.test_lifecycle import process_at

WINDOW_S = 5.0
WINDOWS = 3  # of which the quietest counts: housekeeping comes and goes, a thread that spins does not
SHARE = 0.1  # of a core
LOOPS_PER_CORE = 4
CLIENTS = 4
ASKED = 60


def cpu_s(members: set[int]) -> float:
    """What these processes have used so far, all of their threads."""
    ticks = 0
    for pid in members:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def shares_of_a_core(members: dict[str, set[int]]) -> dict[str, float]:
    """For each worker, during one window."""
    before, began = {name: cpu_s(pids) for name, pids in members.items()}, time.monotonic()
    time.sleep(WINDOW_S)
    took_s = time.monotonic() - began
    return {name: (cpu_s(pids) - before[name]) / took_s for name, pids in members.items()}


def test_idle_workers_do_not_burn_a_core(cluster: Cluster) -> None:
    members = {url: tree(process_at(url)) for url in (cluster.prefill, cluster.decode)}
    assert all(len(pids) > 1 for pids in members.values()), "the engines are processes of their own"
    found = [shares_of_a_core(members) for _ in range(WINDOWS)]
    for url in members:
        assert min(shares[url] for shares in found) < SHARE, found


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Processes that take all that they get."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def expired(cluster: Cluster) -> tuple[float, float]:
    """Hand-offs whose lease has run out, as a worker and as the orchestrator count them."""
    known = samples(cluster.admin)['baton_kv_leases_ended_total{state="expired"}']
    return metric(cluster.prefill, "vllm:nixl_num_kv_expired_reqs_total"), known


def test_answers_come_beside_processes_that_take_all_cores(cluster: Cluster) -> None:
    """An engine that stood still would leave a hand-off lying for longer than its lease."""
    asked = [(list(ANSWERS)[number % len(ANSWERS)], number % 2) for number in range(ASKED)]
    documents = [chat(question) if is_chat else completion(question) for question, is_chat in asked]
    before = expired(cluster)
    with busy_loops(LOOPS_PER_CORE * (os.cpu_count() or 1)), ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(lambda document: post(cluster.front, document), documents))
    assert [text_of(answer).strip() for answer in answers] == [ANSWERS[question] for question, _ in asked]
    assert {answer.headers["x-baton-kv"] for answer in answers} == {"transferred"}
    assert expired(cluster) == before
