from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from launch.bench.prompts import Prompts
from launch.bench.shapes import WORKLOADS, Shape, Workload
from tests.launch.bench.fakes import CORPUS


def prompts(*, seed: str = "1", salt: str = "a", tokens_per_word: float = 1.0, **options: Any) -> Prompts:
    return Prompts(CORPUS, "tiny", options, tokens_per_word, seed=seed, salt=salt)


def document(made: Prompts, workload: Workload, index: int = 0) -> dict[str, Any]:
    return dict(json.loads(b"".join(made.body(workload, index))))


def contents(made: Prompts, workload: Workload, index: int = 0) -> list[str]:
    return [message["content"] for message in document(made, workload, index)["messages"]]


def words(made: Prompts, workload: Workload, index: int = 0) -> int:
    return sum(len(content.split()) for content in contents(made, workload, index))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_every_workload_makes_chat_completions(workload: Workload) -> None:
    made = prompts(ignore_eos=True)
    for index in range(10):
        asked = document(made, workload, index)
        roles = [message["role"] for message in asked.pop("messages") if message["role"] != "system"]
        assert roles[0] == roles[-1] == "user"
        assert all(role != after for role, after in itertools.pairwise(roles))
        assert asked.pop("max_tokens") >= 1
        assert asked == {"model": "tiny", "stream": True, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_the_same_seed_and_salt_are_the_same_bytes(workload: Workload) -> None:
    for index in (0, 17):
        assert prompts().body(workload, index) == prompts().body(workload, index)


def test_another_salt_asks_for_the_same_work_with_other_words() -> None:
    for workload in WORKLOADS.values():
        for index in range(9):
            a, b = (document(prompts(salt=salt), workload, index) for salt in "ab")
            assert a["max_tokens"] == b["max_tokens"]
            assert a["messages"][0] != b["messages"][0]
            counts = [[len(m["content"].split()) for m in asked["messages"]] for asked in (a, b)]
            assert counts[0] == counts[1]


def test_another_seed_varies_the_lengths() -> None:
    chat = WORKLOADS["chat"]
    answers = {document(prompts(seed=str(seed)), chat)["max_tokens"] for seed in range(20)}
    assert len(answers) > 10
    assert 64 <= min(answers) <= max(answers) <= 192


def test_lengths_are_in_tokens() -> None:
    agentic = WORKLOADS["agentic"]
    assert words(prompts(), agentic) == pytest.approx(40_000, rel=0.01)
    assert words(prompts(tokens_per_word=4.0), agentic) == pytest.approx(10_000, rel=0.01)


def test_no_two_prompts_begin_alike() -> None:
    made = prompts()
    beginnings = {contents(made, WORKLOADS["chat"], index)[0][:12] for index in range(1000)}
    assert len(beginnings) == 1000


def test_turns_continue_their_conversation_behind_a_shared_prompt() -> None:
    made, workload = prompts(), WORKLOADS["multi-turn"]
    first, other, second = (contents(made, workload, index) for index in (0, 1, 8))
    assert first[0] == other[0]  # the system prompt
    assert first[1] != other[1]
    assert second[: len(first)] == first
    assert len(second) == len(first) + 2
    last = contents(made, workload, 5 * 8)
    assert len(last) == 2 + 2 * 5
    assert contents(made, workload, 6 * 8)[1] not in (first[1], other[1])  # the next conversation


def test_the_longest_prompt_is_known() -> None:
    for workload in WORKLOADS.values():
        made = prompts()
        asked = [document(made, workload, index) for index in range(60)]
        tokens = [words(made, workload, index) + asked[index]["max_tokens"] for index in range(60)]
        numbers = 40  # one at the beginning of each message
        assert max(tokens) <= workload.longest + numbers


def test_a_mix_takes_its_shapes_in_turn() -> None:
    made, mixed = prompts(), WORKLOADS["mixed"]
    counts = [len(document(made, mixed, index)["messages"]) for index in range(16)]
    assert counts == [*[1] * 7, 38, *[1] * 7, 38]


def test_more_words_than_there_are() -> None:
    endless = Workload("endless", "", (Shape(message=10**9, answer=1),))
    assert words(prompts(), endless) > 100_000
