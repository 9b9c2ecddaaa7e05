"""Messages on real vLLM: the contract of a pair of workers, and Anthropic's SDK through an orchestrator."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.contract.engines import Engine
from tests.contract.messages_cases import *  # noqa: F403  # the cases are the tests
from tests.real.ask import ANSWERS, PREFILL
from tests.real.conftest import Cluster

TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def engine(cluster: Cluster) -> Engine:
    return Engine(cluster.prefill, cluster.decode, "tiny-chat")


def asked(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PREFILL}]
    return {
        "model": "tiny-chat",
        "max_tokens": 80,
        "messages": messages,
        "extra_body": {"temperature": 0},
    } | fields


def test_a_message_through_both_workers(cluster: Cluster) -> None:
    with anthropic.Anthropic(base_url=cluster.front, api_key="none", max_retries=0) as client:
        raw = client.messages.with_raw_response.create(**asked())
        assert raw.headers["x-baton-kv"] == "transferred"
        message = raw.parse()
        assert (message.content[0].text, message.stop_reason) == (ANSWERS[PREFILL], "end_turn")
        with client.messages.stream(**asked()) as stream:
            assert "".join(stream.text_stream) == ANSWERS[PREFILL]
            assert stream.get_final_message().usage == message.usage
        counted = client.messages.count_tokens(model="tiny-chat", messages=asked()["messages"])
        assert counted.input_tokens == message.usage.input_tokens


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "none"}, {"type": "tool", "name": "weather"}])
def test_tools_go_through_both_workers(cluster: Cluster, choice: dict[str, Any]) -> None:
    """What the tiny model makes of a call it must make is no object: a stop string ends it before."""
    with anthropic.Anthropic(base_url=cluster.front, api_key="none", max_retries=0) as client:
        fields = asked(tools=[TOOL], tool_choice=choice, stop_sequences=["arguments"])
        raw = client.messages.with_raw_response.create(**fields)
        assert raw.headers["x-baton-kv"] == "transferred"


@pytest.mark.parametrize("events", range(6))
def test_a_client_that_leaves_a_stream_leaves_nothing_behind(cluster: Cluster, events: int) -> None:
    with anthropic.Anthropic(base_url=cluster.front, api_key="none", max_retries=0) as client:
        stream = client.messages.create(**asked(max_tokens=500), stream=True)
        for _ in zip(range(events), stream, strict=False):
            pass
        stream.close()
