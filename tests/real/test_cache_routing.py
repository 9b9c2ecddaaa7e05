"""Real prefix caches: conversations return to their worker, and what vLLM tells of its cache is believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from orchestrator.wire.kv_events import END_OF_REPLAY, SEQUENCE_BYTES
from tests.baton import SETTLE_S, baton
from tests.real.ask import post, text_of
from tests.real.conftest import DATA, MODEL, Cluster, Stage, free_base, metric
from tests.waiting import wait_for

BLOCKS = 80  # of a prefill worker's KV cache: little more than the longest prompt takes
SIZES = ["--max-model-len", "2048", "--max-num-seqs", "8", "--block-size", "32"]
CONFIG = """
orchestrator: {{listen: "127.0.0.1:{listen}", admin: "127.0.0.1:{admin}"}}
base_port: {base}
routing: {{prefill: kv_events}}
models:
  - name: tiny-chat
    path: {model}
    prefill: {{replicas: 2, device: cpu, args: {prefill}, env: {{VLLM_SERVER_DEV_MODE: "1"}}}}
    decode: {{device: cpu, args: {decode}}}
"""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Two prefill workers with small caches, and a decode worker."""
    base = free_base()
    prefill = [*SIZES, "--num-gpu-blocks-override", str(BLOCKS)]
    config = folder / "cluster.yaml"
    config.write_text(
        CONFIG.format(
            listen=base + 10, admin=base + 11, base=base, model=MODEL, prefill=prefill, decode=SIZES
        )
    )
    with baton("up", str(config), cwd=folder, transport="msgpack") as front:
        yield Cluster(config, front, *(f"http://127.0.0.1:{base + offset}" for offset in (11, 0, 2)))


@contextlib.contextmanager
def running_warm(folder: Path) -> Iterator[Cluster]:
    """The first legs of an engine take many times what they should, which would count against its cache."""
    with running(folder) as cluster:
        for number in range(16):
            Conversation(cluster, f"warm {number}").turn()
        yield cluster


@pytest.fixture(scope="module")
def three(stage: Stage) -> Cluster:
    return stage.show("caches", running_warm)


def prefills(cluster: Cluster) -> list[str]:
    host, _, port = cluster.prefill.rpartition(":")
    return [cluster.prefill, f"{host}:{int(port) + 1}"]


def long_text(name: str, times: int = 3) -> str:
    return " ".join([f"Story {name}.", *[DATA["passage"]] * times])


class Conversation:
    """Each turn adds a little to a long text."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self._messages: list[dict[str, str]] = [{"role": "user", "content": long_text(name)}]

    def turn(self) -> tuple[str, int, int]:
        """Which prefill worker served it, how many tokens its prompt had, and how many were cached."""
        before = [computed(worker) for worker in prefills(self._cluster)]
        body = {"model": "tiny-chat", "messages": self._messages, "temperature": 0, "max_tokens": 8}
        answer = post(self._cluster.front, body)
        self._messages += [
            {"role": "assistant", "content": text_of(answer)},
            {"role": "user", "content": "And then?"},
        ]
        usage = answer.json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return self._served(before), usage["prompt_tokens"], cached

    def _served(self, before: list[float]) -> str:
        def changed() -> list[str]:
            workers = prefills(self._cluster)
            return [each for each, then in zip(workers, before, strict=True) if computed(each) > then]

        (name,) = wait_for(changed, "the worker to say that it was asked", SETTLE_S)
        return name


def computed(worker: str) -> float:
    return metric(worker, "vllm:prefix_cache_queries_total")


def caches(cluster: Cluster) -> list[dict[str, Any]]:
    found = httpx.get(f"{cluster.admin}/admin/workers").json()
    return [each["cache"] or {} for each in found if each["address"]["role"] == "prefill"]


def heard(cluster: Cluster) -> int:
    return sum((cache.get("kv_events") or {}).get("batches", 0) for cache in caches(cluster))


def published(worker: str) -> int:
    """How many batches of KV events it has published."""
    endpoint = httpx.get(f"{worker}/baton/info").json()["kv_events"]["replay_endpoint"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart([b"", bytes(SEQUENCE_BYTES)])
        count = 0
        while socket.poll(SETTLE_S * 1000):
            if socket.recv_multipart()[-2] == END_OF_REPLAY:
                return count
            count += 1
    raise AssertionError("it does not answer")


def foreign(worker: str, name: str, times: int = 3) -> None:
    """Ask a worker something that the orchestrator does not know of."""
    body = {"model": "tiny-chat", "prompt": long_text(name, times), "max_tokens": 1}
    assert httpx.post(f"{worker}/v1/completions", json=body, timeout=300).status_code == 200


def wait_heard(cluster: Cluster, name: str) -> None:
    """Wait until the figures have all that happened before."""
    for worker in prefills(cluster):
        foreign(worker, name, 1)
    count = sum(map(published, prefills(cluster)))
    wait_for(lambda: heard(cluster) == count, "all events to be heard", SETTLE_S)


def block_size(cluster: Cluster) -> int:
    size: int = httpx.get(f"{cluster.prefill}/baton/info").json()["block_size"]
    return size


def wait_followed(cluster: Cluster) -> None:
    def are_followed() -> bool:
        states = [(cache.get("kv_events") or {}).get("state") for cache in caches(cluster)]
        return states == ["followed"] * 2

    wait_for(are_followed, "all KV events to be heard", SETTLE_S)


def test_a_conversation_returns_to_its_worker_and_finds_its_cache(three: Cluster) -> None:
    wait_followed(three)
    size = block_size(three)
    for name in ("one", "two", "three"):
        conversation = Conversation(three, name)
        home, tokens, cached = conversation.turn()
        assert cached < size
        for _ in range(3):
            worker, more, cached = conversation.turn()
            assert worker == home
            assert tokens - 2 * size < cached < more
            tokens = more
    assert all(cache["is_trusted"] for cache in caches(three))


def test_what_vllm_evicts_is_not_expected_any_more(three: Cluster) -> None:
    """Foreign prompts go straight to the worker, until it has nothing left of a conversation."""
    conversation = Conversation(three, "four")
    home, tokens, _ = conversation.turn()
    for number in range(-(-BLOCKS * block_size(three) // tokens) + 1):
        foreign(home, f"foreign {number}")
    wait_heard(three, "what was evicted")
    missed = [cache["missed_ratio"] for cache in caches(three)]
    _, _, cached = conversation.turn()
    assert cached < block_size(three)
    # Had it been expected there, much more would have been missed now.
    wait_heard(three, "the figures of that turn")
    assert [cache["missed_ratio"] for cache in caches(three)] == pytest.approx(missed, abs=0.02)


def test_a_cache_that_was_reset_is_known_to_be_empty(three: Cluster) -> None:
    conversations = [Conversation(three, name) for name in ("five", "six")]
    for conversation in conversations:
        conversation.turn()
        assert conversation.turn()[2] > block_size(three)
    for worker in prefills(three):
        assert httpx.post(f"{worker}/reset_prefix_cache").status_code == 200
    wait_heard(three, "the news that caches are empty")
    for conversation in conversations:
        assert conversation.turn()[2] < block_size(three)
        assert conversation.turn()[2] > block_size(three)
    wait_heard(three, "the figures of that")
    for cache in caches(three):
        assert cache["missed_ratio"] < 0.1
        assert cache["kv_events"] == {
            "state": "followed",
            "batches": cache["kv_events"]["batches"],
            "late": cache["kv_events"]["late"],
            "gaps": cache["kv_events"]["gaps"],
            "unfilled": 0,
            "restarts": 0,
            "garbage": 0,
        }
