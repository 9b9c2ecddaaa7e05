"""An engine that stands still for longer than a lease, on real vLLM: what it says then is not relayed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench.shared.processes import tree
from tests.real.ask import ANSWERS, chat, completion, post, text_of
from tests.real.conftest import Cluster, metric, samples, wait_until_whole
from tests.real.test_lifecycle import process_at
from tests.waiting import wait_for

EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"
LATE = 'baton_handoffs_given_up_total{reason="late"}'
LEASE_S = 30.0  # vLLM's own


@contextlib.contextmanager
def frozen(url: str) -> Iterator[None]:
    """The engine of a worker stands still; its server goes on, and is healthy."""
    server = process_at(url)
    engine = set(tree(server)) - {server}
    assert engine, "the engine is a process of its own"
    try:
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in engine:
            os.kill(pid, signal.SIGCONT)


def test_what_begins_after_the_lease_is_not_relayed(trio: Cluster) -> None:
    """The worker that does both takes over; the engine goes on when others may have the blocks."""
    questions = list(ANSWERS)[:3]
    asked = [chat(questions[0]), chat(questions[1], stream=True), completion(questions[2])]
    assert [text_of(post(trio.front, document)) for document in asked]  # what is slow the first time
    expired, late = metric(trio.prefill, EXPIRED), samples(trio.admin)[LATE]
    with ThreadPoolExecutor(len(asked)) as threads:
        with frozen(trio.decode):
            answers = [threads.submit(post, trio.front, document) for document in asked]
            wait_for(
                lambda: metric(trio.prefill, EXPIRED) == expired + len(asked),
                "the end of leases",
                2 * LEASE_S,
            )
        told = [answer.result() for answer in answers]
    assert [text_of(answer).strip() for answer in told] == [ANSWERS[question] for question in questions]
    assert [answer.headers.get("x-baton-kv") for answer in told] == ["local", None, "local"]
    assert samples(trio.admin)[LATE] == late + len(asked)
    wait_until_whole(trio)
    assert text_of(post(trio.front, asked[0])).strip() == ANSWERS[questions[0]]
