"""Clients that leave and workers that die, on real vLLM: answers are right, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.baton import SETTLE_S
from tests.real.ask import ANSWERS, LIMIT, PREFILL, about_passage, chat, post, text_of
from tests.real.conftest import DATA, Cluster, is_ready, metric, samples, wait_until_whole
from tests.waiting import wait_for

STORM = int(os.environ.get("BATON_STORM", "200"))  # clients
AT_ONCE = 8
SEED = 5

QUESTIONS = ANSWERS | {about_passage(entry): entry["answer"] for entry in DATA["about_passage"]}


def spare(cluster: Cluster) -> str:
    """The URL of the worker that does both."""
    head, _, port = cluster.decode.rpartition(":")
    return f"{head}:{int(port) + 1}"


# --- what is held, and what was given back ------------------------------------------------------


def expired(cluster: Cluster) -> tuple[float, float]:
    """Leases that have run out: those that the prefill worker counts, and those that the ledger does."""
    known = samples(cluster.admin)['baton_kv_leases_ended_total{state="expired"}']
    return metric(cluster.prefill, "vllm:nixl_num_kv_expired_reqs_total"), known


def is_at_rest(cluster: Cluster) -> bool:
    """Nobody runs, waits, or holds KV blocks, and the ledger is closed."""
    held = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    in_use = [metric(url, name) for url in (cluster.prefill, cluster.decode) for name in held]
    return not any(in_use) and metric(cluster.admin, "baton_kv_leases") == 0


def assert_whole(cluster: Cluster) -> None:
    """All that the cluster can do is done again, be it by other processes than before."""
    wait_until_whole(cluster)
    answer = post(cluster.front, chat(PREFILL))
    assert text_of(answer) == ANSWERS[PREFILL]
    assert answer.headers["x-baton-path"] == "disaggregated"
    assert answer.headers["x-baton-kv"] == "transferred"
    wait_for(lambda: is_at_rest(cluster), "rest")


# --- clients that leave -------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A client that sends its body in two parts and leaves when its patience ends, wherever that is."""

    question: str
    is_stream: bool
    pause_s: float  # in the middle of its body
    patience_s: float | None  # None: it stays to the end

    async def answer(self, client: httpx.AsyncClient) -> str | None:
        """What it is told; None if it has left before."""
        body = json.dumps(chat(self.question, stream=self.is_stream)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        try:
            async with asyncio.timeout(self.patience_s):
                content = self._parts(body)
                return text_of(await client.post("/v1/chat/completions", headers=headers, content=content))
        except TimeoutError:
            return None

    async def _parts(self, body: bytes) -> AsyncIterator[bytes]:
        middle = len(body) // 2
        yield body[:middle]
        await asyncio.sleep(self.pause_s)
        yield body[middle:]


def visits(count: int, random: Random, longest_s: float | None = None) -> Iterator[Visit]:
    for _ in range(count):
        patience_s = None if longest_s is None else random.uniform(0, longest_s)
        yield Visit(
            random.choice(list(QUESTIONS)), random.random() < 0.5, random.uniform(0, 0.05), patience_s
        )


def storm(front: str, planned: Iterable[Visit]) -> tuple[list[tuple[str, str | None]], float]:
    """What each client asked and was told, a few at a time, and how long the slowest stayed."""

    async def main() -> tuple[list[tuple[str, str | None]], float]:
        seats, stays = asyncio.Semaphore(AT_ONCE), [0.0]

        async def one(visit: Visit) -> tuple[str, str | None]:
            async with seats:
                start = time.monotonic()
                answer = await visit.answer(client)
                stays.append(time.monotonic() - start)
                return visit.question, answer

        async with httpx.AsyncClient(base_url=front, timeout=LIMIT) as client:
            return await asyncio.gather(*map(one, planned)), max(stays)

    return asyncio.run(main())


def test_clients_that_leave_at_any_moment_leave_nothing_behind(trio: Cluster) -> None:
    random = Random(SEED)
    storm(trio.front, visits(AT_ONCE, random))  # what is slow the first time
    _, longest_s = storm(trio.front, visits(2 * AT_ONCE, random))
    wait_for(lambda: is_at_rest(trio), "rest before the storm")
    before, start = expired(trio), time.monotonic()
    told, _ = storm(trio.front, visits(STORM, random, longest_s))
    wait_for(lambda: is_at_rest(trio), "rest after the storm")
    stranded, known = (now - then for now, then in zip(expired(trio), before, strict=True))
    left = sum(answer is None for _, answer in told)
    took_s = time.monotonic() - start
    print(f"{left} of {STORM} left within {longest_s:.2f} s, {took_s:.0f} s in all")
    print(f"{stranded:.0f} leases ran out, {known:.0f} of which the ledger did not know an end")
    assert all(answer in (None, QUESTIONS[question]) for question, answer in told)
    assert 0 < left < STORM
    assert stranded <= known
    assert_whole(trio)


# --- workers that die ---------------------------------------------------------------------------


def process_at(url: str) -> int:
    """The server that was told to listen there."""
    port = url.rpartition(":")[2].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            argv = path.read_bytes().split(b"\0")
            if b"vllm.entrypoints.openai.api_server" in argv and argv[argv.index(b"--port") + 1] == port:
                return int(path.parent.name)
    raise AssertionError(f"no worker listens at {url}")


# Their ids are asked for because what follows an ignored EOS depends on it, and no text shows it.
LONG = [
    chat(question, max_tokens=300, ignore_eos=True, stream=True, return_token_ids=True)
    for question in list(ANSWERS)[:AT_ONCE]
]


def stream(front: str, document: dict[str, Any], begun: threading.Barrier) -> str:
    """A stream's text; `begun` is met at its first event."""
    with httpx.stream("POST", f"{front}/v1/chat/completions", json=document, timeout=LIMIT) as answer:
        pieces = answer.iter_bytes()
        received = next(pieces)
        begun.wait(SETTLE_S)
        received += b"".join(pieces)
    return text_of(httpx.Response(answer.status_code, headers=answer.headers, content=received))


def streams_while_the_decode_worker_dies(cluster: Cluster, number: int) -> list[str]:
    """The texts of all streams; the worker is sent the signal when every one has begun."""
    begun = threading.Barrier(AT_ONCE + 1)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        told = threads.map(lambda document: stream(cluster.front, document, begun), LONG)
        begun.wait(SETTLE_S)
        os.kill(process_at(cluster.decode), number)
        return list(told)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_streams_of_a_decode_worker_that_dies_go_on_word_for_word(trio: Cluster, number: int) -> None:
    def replaced() -> float:
        return samples(trio.admin)['baton_upstream_retries_total{reason="stream"}']

    before = replaced()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        expected = list(threads.map(lambda document: text_of(post(spare(trio), document)), LONG))
    assert streams_while_the_decode_worker_dies(trio, number) == expected
    # Where servers get no time at all, its engine may have made every last token before a first one is told.
    while replaced() == before:
        wait_for(lambda: not is_ready(trio, "decode"), "the end of the decode worker")
        wait_until_whole(trio)
        assert streams_while_the_decode_worker_dies(trio, number) == expected
    answer = post(trio.front, chat(PREFILL))
    assert text_of(answer) == ANSWERS[PREFILL]
    assert answer.headers["x-baton-path"] == "aggregated"
    assert_whole(trio)


def test_a_prefill_worker_that_dies_costs_nobody_an_answer(trio: Cluster) -> None:
    """Its hand-offs die with it: what a decode worker pulled of another engine would be no answer."""
    is_over = threading.Event()
    paths: list[str] = []

    def ask_on(questions: list[str]) -> None:
        for question in itertools.cycle(questions):
            answer = post(trio.front, chat(question))
            assert text_of(answer) == QUESTIONS[question]
            paths.append(answer.headers["x-baton-path"])
            if is_over.is_set():
                return

    with ThreadPoolExecutor(AT_ONCE) as threads:
        asking = [threads.submit(ask_on, list(QUESTIONS)[number::AT_ONCE]) for number in range(AT_ONCE)]
        try:
            wait_for(lambda: "disaggregated" in paths, "answers of the pair")
            os.kill(process_at(trio.prefill), signal.SIGKILL)
            wait_for(lambda: "aggregated" in paths, "answers of the spare worker")
            wait_for(lambda: not is_ready(trio, "prefill"), "the end of the prefill worker")
        finally:
            is_over.set()
        for each in asking:
            each.result()
    assert_whole(trio)
    assert metric(trio.prefill, "vllm:nixl_num_kv_expired_reqs_total") == 0
