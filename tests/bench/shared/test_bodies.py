from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from bench.shared.bodies import agentic_chat, long_chat, small_chat, token_ids


@pytest.mark.parametrize(
    ("body", "size"),
    [(small_chat, 250), (long_chat, 230_000), (agentic_chat, 1_000_000), (token_ids, 250_000)],
)
def test_bodies_have_the_size_of_their_name_and_never_change(body: Callable[[], bytes], size: int) -> None:
    assert len(body()) == pytest.approx(size, rel=0.1)
    assert body() == body()


def test_long_chat_has_a_hundred_messages_behind_its_system_prompt() -> None:
    roles = [message["role"] for message in json.loads(long_chat())["messages"]]
    assert roles == ["system", *["user", "assistant"] * 50]


def test_agentic_chat_calls_tools_that_it_defines() -> None:
    chat = json.loads(agentic_chat())
    defined = {tool["function"]["name"] for tool in chat["tools"]}
    calls = [call for message in chat["messages"] for call in message.get("tool_calls", [])]
    assert {call["function"]["name"] for call in calls} <= defined
    assert all(json.loads(call["function"]["arguments"]) for call in calls)


def test_token_ids_are_forty_thousand() -> None:
    assert len(json.loads(token_ids())["prompt"]) == 40_000
