"""The contract of Anthropic's Messages: `/v1/messages` in two legs, and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.contract.cases import HANDOFF, WRONG_HANDOFFS, unique
from tests.contract.engines import ASK_PINNED, LIMIT_S, Engine
from tests.contract.shapes import Either, Is, assert_shape

PATH = "/v1/messages"
STOP = {"stop_reason": Either(Is("end_turn"), Is("max_tokens"), Is("stop_sequence"))}
USAGE = {
    "input_tokens": int,
    "output_tokens": int,
    "cache_creation_input_tokens": int,
    "cache_read_input_tokens": int,
}
MESSAGE = {
    "id": str,
    "type": Is("message"),
    "role": Is("assistant"),
    "content": [{"type": Is("text"), "text": str}],
    "model": str,
    "usage": USAGE,
} | STOP


def message(engine: Engine, said: str = "What is prefill?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": said}]
    return {"model": engine.model, "messages": messages, "temperature": 0, "max_tokens": 4} | fields


def post(url: str, document: dict[str, Any], path: str = PATH) -> httpx.Response:
    return httpx.post(url + path, json=document, timeout=LIMIT_S)


def prefill(engine: Engine, document: dict[str, Any]) -> dict[str, Any]:
    answer = post(engine.prefill_url, document | {"max_tokens": 1, "kv_transfer_params": ASK_PINNED})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def handoff(engine: Engine, document: dict[str, Any]) -> dict[str, Any]:
    params = dict(prefill(engine, document)["kv_transfer_params"])
    del params["remote_prefill_cached_tokens"]
    return params


def named_events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.status_code == 200, answer.text
    frames = answer.text.split("\n\n")
    assert frames[-1] == ""
    found = []
    for frame in frames[:-1]:
        name, data = frame.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        found.append((document["type"], document))
    return found


def test_a_whole_message(engine: Engine) -> None:
    answer = post(engine.decode_url, message(engine))
    assert answer.status_code == 200, answer.text
    assert_shape(answer.json(), MESSAGE)


def test_a_prefill_leg_gives_a_handoff(engine: Engine) -> None:
    document = message(engine, unique())
    answer = prefill(engine, document)
    params = answer.pop("kv_transfer_params")
    assert_shape(answer, MESSAGE)
    assert_shape(params, {name: HANDOFF[name] for name in params})
    assert set(HANDOFF) - set(params) <= {"remote_blocks_expiry_time"}  # nulls may be left out
    del params["remote_prefill_cached_tokens"]
    assert post(engine.decode_url, document | {"kv_transfer_params": params}).status_code == 200


def test_a_decode_leg_has_it_all_from_the_cache(engine: Engine) -> None:
    document = message(engine, unique())
    params = handoff(engine, document)
    answer = post(engine.decode_url, document | {"kv_transfer_params": params}).json()
    usage = answer["usage"]
    assert usage["input_tokens"] == usage["cache_creation_input_tokens"] == 0
    assert usage["cache_read_input_tokens"] > 0
    assert "kv_transfer_params" not in answer


@pytest.mark.parametrize("in_two", [False, True])
def test_the_events_of_a_stream(engine: Engine, in_two: bool) -> None:
    document = message(engine, unique())
    params = {"kv_transfer_params": handoff(engine, document)} if in_two else {}
    events = named_events(post(engine.decode_url, document | {"stream": True} | params))
    names = [name for name, _ in events]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start",
        *(["content_block_start"] if deltas else []),
        *["content_block_delta"] * deltas,
        *(["content_block_stop"] if deltas else []),
        "message_delta",
        "message_stop",
    ]
    start, last = events[0][1], events[-2][1]
    assert start["message"]["content"] == []
    assert_shape(last["usage"], USAGE)
    assert_shape(last["delta"], STOP | {"stop_sequence": Either(str, None)})
    fresh = last["usage"]["input_tokens"] + last["usage"]["cache_creation_input_tokens"]
    assert (fresh == 0) == in_two


def test_a_prefill_leg_of_a_tool_that_must_be_called(engine: Engine) -> None:
    """A stop string keeps one token from being read as the call's arguments, which it is not."""
    tool = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    stopped = {"tools": [tool], "tool_choice": {"type": "tool", "name": "f"}, "stop_sequences": ["{"]}
    document = message(engine, unique(), **stopped)
    answer = post(engine.decode_url, document | {"kv_transfer_params": handoff(engine, document)})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", WRONG_HANDOFFS)
def test_a_handoff_that_is_lost(engine: Engine, name: str) -> None:
    document = message(engine, unique())
    params = handoff(engine, document)
    answer = post(engine.decode_url, document | {"kv_transfer_params": params | WRONG_HANDOFFS[name]})
    assert answer.status_code == 500
    assert_shape(answer.json(), {"type": Is("error"), "error": {"type": str, "message": str}})
    post(engine.decode_url, document | {"kv_transfer_params": params})


@pytest.mark.parametrize("name", WRONG_HANDOFFS)
def test_a_stream_whose_handoff_is_lost(engine: Engine, name: str) -> None:
    document = message(engine, unique())
    params = handoff(engine, document)
    wrong = {"kv_transfer_params": params | WRONG_HANDOFFS[name], "stream": True}
    events = named_events(post(engine.decode_url, document | wrong))
    assert [name for name, _ in events] == ["message_start", "error"]
    assert_shape(events[-1][1], {"type": Is("error"), "error": {"type": str, "message": str}})
    post(engine.decode_url, document | {"kv_transfer_params": params})


def test_errors(engine: Engine) -> None:
    unknown = post(engine.decode_url, message(engine, model="unknown"))
    assert unknown.status_code == 404
    assert_shape(unknown.json(), {"type": Is("error"), "error": {"type": str, "message": str}})
    malformed = post(engine.decode_url, message(engine, max_tokens=0))
    assert malformed.status_code == 400
    assert malformed.json().keys() == {"error"}  # refused before the endpoint, in OpenAI's form


def test_tokens_are_counted(engine: Engine) -> None:
    document = message(engine)
    del document["max_tokens"]
    answer = post(engine.decode_url, document, f"{PATH}/count_tokens")
    count = answer.json()["input_tokens"]
    assert answer.json() == {"input_tokens": count, "context_management": {"original_input_tokens": count}}
    usage = post(engine.decode_url, message(engine)).json()["usage"]
    assert (
        count
        == usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    )
