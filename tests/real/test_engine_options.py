"""What vLLM is started with beside the usual: data-parallel engines, LoRA adapters, priorities."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.baton import SETTLE_S, baton
from tests.contract.engines import Engine
from tests.metrics import sum_of
from tests.real.adapters import RANK, make_adapter
from tests.real.ask import LIMIT, PREFILL, chat, completion, post, text_of
from tests.real.conftest import DATA, MODEL, Cluster, Stage, assert_nothing_pinned, free_base, metric
from tests.real.test_doctor import doctor, found
from tests.waiting import wait_for

ADAPTER, LATE = "poems", "songs"  # the second one is loaded while the workers run
ENGINES = 2
LENGTH = 16384  # tokens, which take a minute or more: longer than others need to get into the queue
CONFIG = """
orchestrator: {{listen: "127.0.0.1:{listen}", admin: "127.0.0.1:{admin}"}}
base_port: {base}
health: {{interval_s: 0.2}}
routing: {{overrides: [x-baton-worker-prefill]}}
models:
  - name: tiny-chat
    path: {model}
    prefill: {{device: cpu, args: {args}, data_parallel_size: {engines}}}
    decode: {{device: cpu, args: {decode}, seats: 8, env: {{VLLM_ALLOW_RUNTIME_LORA_UPDATING: "1"}}}}
"""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """One prefill worker of two engines, and a decode worker that answers one request after the other."""
    base = free_base()
    args = ["--max-model-len", str(LENGTH), "--block-size", "32", "--scheduling-policy", "priority"]
    args += ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"]
    args += ["--lora-modules", f"{ADAPTER}={make_adapter(folder / ADAPTER, 1)}"]
    make_adapter(folder / LATE, 2)
    config = folder / "cluster.yaml"
    config.write_text(
        CONFIG.format(
            listen=base + 10,
            admin=base + 11,
            base=base,
            model=MODEL,
            engines=ENGINES,
            args=[*args, "--max-num-seqs", "8"],
            decode=[*args, "--max-num-seqs", "1"],
        )
    )
    with baton("up", str(config), cwd=folder, transport="msgpack") as front:
        yield Cluster(config, front, *(f"http://127.0.0.1:{base + offset}" for offset in (11, 0, 1)))


@contextlib.contextmanager
def running_warm(folder: Path) -> Iterator[Cluster]:
    """The first legs of an engine take many times what they should, which would count against its cache."""
    with running(folder) as cluster:
        for number in range(4 * ENGINES):
            Turns(cluster, f"warm {number}").turn(**engine_of(number % ENGINES))
        yield cluster


@pytest.fixture(scope="module")
def ranked(stage: Stage) -> Cluster:
    return stage.show("ranked", running_warm)


@pytest.fixture(autouse=True)
def nothing_is_left(ranked: Cluster) -> Iterator[None]:
    yield
    assert_nothing_pinned(ranked)


def long_text(name: str) -> str:
    return " ".join([f"Story {name}.", *[DATA["passage"]] * 4])


def engine_of(rank: int) -> dict[str, str]:
    """The header with which a client asks for an engine of the prefill worker."""
    return {"x-baton-worker-prefill": f"tiny-chat/prefill/0.dp{rank}"}


# --- roles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_an_engine_of_either_kv_role_does_all_that_is_asked_of_it(
    ranked: Cluster, is_exchanged: bool
) -> None:
    """So one that announces no role may be in any pool, and any engine may serve whole requests."""
    urls = [ranked.prefill, ranked.decode]
    engine = Engine(*(reversed(urls) if is_exchanged else urls), "tiny-chat")
    document = completion(PREFILL, max_tokens=16)
    alone = text_of(engine.ask(document))
    answer = engine.decode(document, engine.handoff(document | {"cache_salt": "mine"}), cache_salt="mine")
    assert text_of(answer) == alone
    usage = answer.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    wait_for(lambda: engine.kv_usage() == 0, "no pinned blocks", SETTLE_S)


# --- data-parallel engines --------------------------------------------------------------------------


def asked(cluster: Cluster) -> list[float]:
    """How many tokens each engine of the prefill worker has been asked for."""
    text = httpx.get(f"{cluster.prefill}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_queries_total")]
    return [
        sum_of(
            "\n".join(line for line in lines if f'engine="{rank}"' in line), "vllm:prefix_cache_queries_total"
        )
        for rank in range(ENGINES)
    ]


class Turns:
    """A conversation, each turn of which says which engine served it and how much of it was cached."""

    def __init__(self, cluster: Cluster, name: str, **fields: Any) -> None:
        self._cluster = cluster
        self._fields = {"max_tokens": 8} | fields
        self._messages: list[dict[str, str]] = [{"role": "user", "content": long_text(name)}]

    def turn(self, **headers: str) -> tuple[int, int]:
        before = asked(self._cluster)
        document = chat("", **self._fields) | {"messages": self._messages}
        answer = httpx.post(
            f"{self._cluster.front}/v1/chat/completions", json=document, headers=headers, timeout=LIMIT
        )
        self._messages += [
            {"role": "assistant", "content": text_of(answer)},
            {"role": "user", "content": "And then?"},
        ]
        assert answer.headers["x-baton-kv"] == "transferred"
        return self._engine(before), answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def _engine(self, before: list[float]) -> int:
        def served() -> list[int]:
            return [rank for rank, now in enumerate(asked(self._cluster)) if now > before[rank]]

        (rank,) = wait_for(served, "the engine to say that it was asked", SETTLE_S)
        return rank


def test_each_engine_is_a_worker_and_gets_what_is_sent_to_it(ranked: Cluster) -> None:
    for rank in (0, 1, 1, 0):
        assert Turns(ranked, f"sent to {rank}").turn(**engine_of(rank))[0] == rank


def test_a_conversation_returns_to_its_engine(ranked: Cluster) -> None:
    for name in ("one", "two", "three", "four"):
        conversation = Turns(ranked, name)
        home, cached = conversation.turn()
        assert cached < 32
        for _ in range(2):
            rank, cached = conversation.turn()
            assert rank == home
            assert cached > 64


def test_the_doctor_tries_each_engine(ranked: Cluster) -> None:
    document = doctor(ranked.config.parent, ranked.config)
    assert found(document, "fail") == []
    for check, names in {
        "answer": ["tiny-chat/prefill/0.dp0", "tiny-chat/prefill/0.dp1", "tiny-chat/decode/0"],
        "handoff": [f"tiny-chat/prefill/0.dp{rank} -> tiny-chat/decode/0" for rank in range(ENGINES)],
    }.items():
        assert [each["subject"] for each in found(document, "ok") if each["check"] == check] == names


# --- LoRA adapters ----------------------------------------------------------------------------------


def test_an_adapter_answers_for_itself_through_both_workers(ranked: Cluster) -> None:
    alone = text_of(post(ranked.decode, completion(PREFILL, model=ADAPTER, max_tokens=16)))
    for stream in (False, True):
        answer = post(ranked.front, completion(PREFILL, model=ADAPTER, max_tokens=16, stream=stream))
        assert text_of(answer) == alone
        assert answer.headers["x-baton-path"] == "disaggregated"
    assert text_of(post(ranked.front, completion(PREFILL, max_tokens=16))) != alone


def test_a_conversation_with_an_adapter_returns_to_its_engine(ranked: Cluster) -> None:
    ours, plain = Turns(ranked, "adapter", model=ADAPTER), Turns(ranked, "adapter")
    home, cached = ours.turn()
    assert cached < 32
    assert plain.turn()[1] < 32  # the model alone has another cache of the same words
    for _ in range(2):
        rank, cached = ours.turn()
        assert rank == home
        assert cached > 64


def names(cluster: Cluster) -> list[str]:
    return [model["id"] for model in httpx.get(f"{cluster.front}/v1/models").json()["data"]]


def test_an_adapter_that_is_loaded_while_workers_run_goes_to_those_that_have_it(ranked: Cluster) -> None:
    ask = completion(PREFILL, model=LATE, max_tokens=16)
    assert post(ranked.front, ask).status_code == 404
    change = {"lora_name": LATE, "lora_path": str(ranked.config.parent / LATE)}
    assert httpx.post(f"{ranked.decode}/v1/load_lora_adapter", json=change, timeout=LIMIT).is_success
    wait_for(lambda: LATE in names(ranked), "the adapter to be known", SETTLE_S)
    before = asked(ranked)
    answer = post(ranked.front, ask)
    assert text_of(answer) == text_of(post(ranked.decode, ask))
    assert answer.headers["x-baton-path"] == "aggregated"  # no prefill worker has it
    assert asked(ranked) == before
    assert httpx.post(f"{ranked.decode}/v1/unload_lora_adapter", json=change, timeout=LIMIT).is_success
    wait_for(lambda: LATE not in names(ranked), "the adapter to be forgotten", SETTLE_S)
    assert post(ranked.front, ask).status_code == 404


# --- priorities -------------------------------------------------------------------------------------


def test_a_request_of_a_higher_priority_overtakes(ranked: Cluster) -> None:
    """The only seat of the decode worker's engine is taken, and two wait for it: the later one is next."""
    done: list[str] = []
    long = completion("Tell it all.", max_tokens=LENGTH - 100, ignore_eos=True, stream=True, stop=None)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = stack.enter_context(
            httpx.stream("POST", f"{ranked.front}/v1/completions", json=long, timeout=LIMIT)
        )
        lines = first.iter_lines()  # to be kept: the stream ends with it
        next(lines)
        waiting: list[Future[None]] = []
        for name, priority in (("usual", 5), ("urgent", -5)):
            waiting.append(pool.submit(_ask_and_note, ranked, name, priority, done))
            wait_for(functools.partial(_is_queued, ranked, len(waiting)), f"the {name} one to wait", SETTLE_S)
        stack.close()  # the client of the long one leaves
        for one in waiting:
            one.result(SETTLE_S)
    assert done == ["urgent", "usual"]


def _ask_and_note(cluster: Cluster, name: str, priority: int, done: list[str]) -> None:
    answer = post(
        cluster.front, completion(f"{name}: {PREFILL}", priority=priority, max_tokens=60, ignore_eos=True)
    )
    assert answer.status_code == 200, answer.text
    done.append(name)


def _is_queued(cluster: Cluster, count: int) -> bool:
    return metric(cluster.decode, "vllm:num_requests_waiting") == count
