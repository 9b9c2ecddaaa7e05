"""Responses on real vLLM: the contract of a pair of workers, and OpenAI's SDK through an orchestrator."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.contract.engines import Engine
from tests.contract.responses_cases import *  # noqa: F403  # the cases are the tests
from tests.real.ask import ANSWERS, PREFILL
from tests.real.conftest import Cluster

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def engine(cluster: Cluster) -> Engine:
    return Engine(cluster.prefill, cluster.decode, "tiny-chat")


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-chat", "max_output_tokens": 80, "temperature": 0, "input": PREFILL} | fields


def test_a_response_through_both_workers(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.front}/v1", api_key="none", max_retries=0) as client:
        raw = client.responses.with_raw_response.create(**asked())
        assert raw.headers["x-baton-kv"] == "transferred"
        response = raw.parse()
        assert (response.output_text, response.status) == (ANSWERS[PREFILL], "completed")
        with client.responses.stream(**asked()) as stream:
            events = list(stream)
            last = stream.get_final_response()
        assert last.output_text == ANSWERS[PREFILL]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert last.usage == response.usage


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "weather"}, "none"])
def test_tools_go_through_both_workers(cluster: Cluster, choice: Any) -> None:
    with openai.OpenAI(base_url=f"{cluster.front}/v1", api_key="none", max_retries=0) as client:
        raw = client.responses.with_raw_response.create(**asked(tools=[TOOL], tool_choice=choice))
        assert raw.headers["x-baton-kv"] == "transferred"
        assert raw.parse().output


@pytest.mark.parametrize("events", range(6))
def test_a_client_that_leaves_a_stream_leaves_nothing_behind(cluster: Cluster, events: int) -> None:
    with openai.OpenAI(base_url=f"{cluster.front}/v1", api_key="none", max_retries=0) as client:
        fields = asked(max_output_tokens=500, extra_body={"ignore_eos": True})
        stream = client.responses.create(**fields, stream=True)
        for _ in zip(range(events), stream, strict=False):
            pass
        stream.close()
