"""Each toxic on each of the three links: every answer is right or says that it is none, nothing hangs, and
nothing stays taken.

Some streams are under way when a toxic is added, other requests come while it is there. The workers' side
channel is not one of the links.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.faults.asking import ask
from tests.faults.cluster import KV_LEASE_S, LINKS, Cluster, Link, orchestrating
from tests.faults.proxy import (
    DIRECTIONS,
    Bandwidth,
    Direction,
    Down,
    Latency,
    Limit,
    Reset,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)
from tests.orchestrator.running import PATIENCE_S, SimWorker, simulated
from worker.sim.questions import Outcome, Question, chat, completion

pytestmark = pytest.mark.processes

# A step takes so long that a stream is still under way when a toxic is added. The lease is short, as blocks
# whose hand-off was lost on the way stay pinned until it ends.
SIM_OPTIONS = ["--decode-ms-per-token", "5", "--lease-s", str(KV_LEASE_S)]
TOKENS = 30

DEADLINE_S = 1.0
STRICT = {
    "header_timeout_s": DEADLINE_S,
    "body_idle_timeout_s": DEADLINE_S,
    "request_timeout_s": DEADLINE_S,
    "stream_idle_timeout_s": DEADLINE_S,
    "connect_timeout_s": DEADLINE_S,
}

# They slow a link down and lose nothing: whoever waits gets the right answer.
SLOW = [Latency(0.02, jitter_s=0.02), Bandwidth(100_000), Slicer(100, 0.001), SlowClose(0.1)]

# Bytes: within the head or the body of a request, or of an answer; within the events of a stream.
CUTS: list[tuple[Toxic, Direction]] = [
    (Reset(0), "downstream"),
    (Reset(300), "upstream"),
    (Reset(1500), "downstream"),
    (Limit(300), "upstream"),
    (Limit(1500), "downstream"),
    (Timeout(0.2), "downstream"),
    (Down(), "downstream"),
]
each_cut = pytest.mark.parametrize(("toxic", "direction"), CUTS, ids=str)

NEW = [
    make(said, TOKENS, is_stream=is_stream)
    for make, said in ((completion, "Prefill is"), (chat, "What is decode?"))
    for is_stream in (False, True)
]
UNDER_WAY = [
    completion("Once there was", 2 * TOKENS, is_stream=True),
    chat("Tell me a story", 2 * TOKENS, is_stream=True),
]


@pytest.fixture(scope="module")
def workers(streams: str) -> Iterator[list[SimWorker]]:
    """Legs go to them on connections of their own, or on one that they share."""
    with simulated("prefill", "decode", "prefill", "decode", options=SIM_OPTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def patient(workers: list[SimWorker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With the limits of the defaults, which not even a slow machine reaches."""
    with orchestrating(tmp_path_factory.mktemp("patient"), workers[:2], {}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def strict(workers: list[SimWorker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with orchestrating(tmp_path_factory.mktemp("strict"), workers[:2], STRICT) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def spared(workers: list[SimWorker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a second worker of each role, whose links are always well."""
    with orchestrating(tmp_path_factory.mktemp("spared"), workers, STRICT) as cluster:
        yield cluster


def outcomes(
    cluster: Cluster, link: Link, toxic: Toxic, *directions: Direction, patience_s: float = PATIENCE_S
) -> set[Outcome]:
    """Of all requests that this toxic may have spoiled. It is there until the last of them is over."""
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        begun = [_begin(pool, cluster.url, question, patience_s) for question in UNDER_WAY]
        stack.enter_context(cluster.proxies[link].toxic(toxic, *directions))
        later = [pool.submit(ask, cluster.url, question, patience_s) for question in NEW]
        return {future.result() for future in [*begun, *later]}


def _begin(pool: ThreadPoolExecutor, url: str, question: Question, patience_s: float) -> Future[Outcome]:
    """Ask, and wait until the answer has begun."""
    has_begun = threading.Event()
    future = pool.submit(ask, url, question, patience_s, has_begun.set)
    future.add_done_callback(lambda _: has_begun.set())
    assert has_begun.wait(PATIENCE_S)
    return future


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("toxic", SLOW, ids=repr)
def test_a_slow_link_changes_no_answer(patient: Cluster, link: Link, toxic: Toxic) -> None:
    assert outcomes(patient, link, toxic) == {Outcome.RIGHT}
    patient.wait_well()


@pytest.mark.parametrize("link", ["prefill", "decode"])
@each_cut
def test_a_worker_that_is_cut_off_leaves_no_wrong_answer(
    strict: Cluster, link: Link, toxic: Toxic, direction: Direction
) -> None:
    assert outcomes(strict, link, toxic, direction) <= {Outcome.RIGHT, Outcome.ERROR}
    strict.wait_well()


@pytest.mark.parametrize("link", ["prefill", "decode"])
@pytest.mark.parametrize("toxic", [Reset(1500), Down()], ids=repr)
def test_nor_does_one_that_another_can_replace(spared: Cluster, link: Link, toxic: Toxic) -> None:
    assert outcomes(spared, link, toxic, "downstream") == {Outcome.RIGHT}
    spared.wait_well()


@pytest.mark.parametrize("link", ["prefill", "decode"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_silent_worker_holds_nobody_past_the_deadline(
    strict: Cluster, link: Link, direction: Direction
) -> None:
    assert outcomes(strict, link, Timeout(), direction) <= {Outcome.RIGHT, Outcome.ERROR}
    strict.wait_well()


@each_cut
def test_a_client_that_is_cut_off_sees_it(strict: Cluster, toxic: Toxic, direction: Direction) -> None:
    found = outcomes(strict, "client", toxic, direction)
    assert found <= {Outcome.RIGHT, Outcome.ERROR, Outcome.CUT}
    strict.wait_well()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_client_behind_a_silent_link_gives_up(strict: Cluster, direction: Direction) -> None:
    """Nobody can tell it; but nothing is kept for it, either."""
    outcomes(strict, "client", Timeout(), direction, patience_s=DEADLINE_S)
    strict.wait_well()
