"""The contract of OpenAI's Responses: `/v1/responses` in two legs, of workers that store none."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.contract.cases import HANDOFF, WRONG_HANDOFFS, error, unique
from tests.contract.engines import ASK_PINNED, LIMIT_S, Engine
from tests.contract.shapes import Either, Is, assert_shape

PATH = "/v1/responses"
LISTS = Either([int], Is([]))
USAGE = {
    "input_tokens": int,
    "input_tokens_details": {
        "cached_tokens": int,
        "cache_write_tokens": int,
        "input_tokens_per_turn": LISTS,
        "cached_tokens_per_turn": LISTS,
    },
    "output_tokens": int,
    "output_tokens_details": {
        "reasoning_tokens": int,
        "tool_output_tokens": int,
        "output_tokens_per_turn": LISTS,
        "tool_output_tokens_per_turn": LISTS,
    },
    "total_tokens": int,
}
TEXT = {"annotations": Is([]), "text": str, "type": Is("output_text"), "logprobs": None}
MESSAGE = {
    "id": str,
    "content": [TEXT],
    "role": Is("assistant"),
    "status": Is("completed"),
    "type": Is("message"),
    "phase": None,
}


def response(engine: Engine, said: Any = "What is prefill?", **fields: Any) -> dict[str, Any]:
    return {"model": engine.model, "input": said, "temperature": 0, "max_output_tokens": 4} | fields


def shape(engine: Engine, **changed: Any) -> dict[str, Any]:
    status = Either(Is("completed"), Is("incomplete"))
    return {
        "id": str,
        "created_at": int,
        "incomplete_details": Either(None, {"reason": Is("max_output_tokens")}),
        "instructions": None,
        "metadata": None,
        "model": Is(engine.model),
        "object": Is("response"),
        "output": [MESSAGE],
        "parallel_tool_calls": Is(True),
        "temperature": float,
        "tool_choice": Is("none"),
        "tools": Is([]),
        "top_p": float,
        "background": Is(False),
        "max_output_tokens": int,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": Is("auto"),
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": Is("disabled"),
        "usage": USAGE,
        "user": None,
        "presence_penalty": float,
        "frequency_penalty": float,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    } | changed


def post(url: str, document: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + PATH, json=document, timeout=LIMIT_S)


def prefill(engine: Engine, document: dict[str, Any]) -> dict[str, Any]:
    leg = {"max_output_tokens": 1, "ignore_eos": True, "store": False, "kv_transfer_params": ASK_PINNED}
    answer = post(engine.prefill_url, document | leg)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def handoff(engine: Engine, document: dict[str, Any]) -> dict[str, Any]:
    params = dict(prefill(engine, document)["kv_transfer_params"])
    del params["remote_prefill_cached_tokens"]
    return params


def read_stream(url: str, document: dict[str, Any], pieces: list[str]) -> None:
    """Append what comes."""
    with httpx.stream("POST", url + PATH, json=document, timeout=LIMIT_S) as answer:
        pieces += answer.iter_text()


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    frames = text.split("\n\n")
    assert frames[-1] == ""
    found = []
    for number, frame in enumerate(frames[:-1]):
        name, data = frame.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        assert document["sequence_number"] == number
        found.append((document["type"].removeprefix("response."), document))
    return found


def test_a_whole_response(engine: Engine) -> None:
    answer = post(engine.decode_url, response(engine))
    assert answer.status_code == 200, answer.text
    assert_shape(answer.json(), shape(engine))


def test_the_name_in_the_body_is_the_responses(engine: Engine) -> None:
    name = unique()
    assert post(engine.decode_url, response(engine, request_id=name)).json()["id"] == name


def test_a_prefill_leg_gives_a_handoff(engine: Engine) -> None:
    document = response(engine, unique())
    answer = prefill(engine, document)
    assert_shape(answer, shape(engine, kv_transfer_params=HANDOFF, output=Either([MESSAGE], Is([]))))
    params = answer["kv_transfer_params"]
    del params["remote_prefill_cached_tokens"]
    assert post(engine.decode_url, document | {"kv_transfer_params": params}).status_code == 200


def test_a_decode_leg_has_it_all_from_the_cache(engine: Engine) -> None:
    document = response(engine, unique())
    params = handoff(engine, document)
    usage = post(engine.decode_url, document | {"kv_transfer_params": params}).json()["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] > 0


@pytest.mark.parametrize("in_two", [False, True])
def test_the_events_of_a_stream(engine: Engine, in_two: bool) -> None:
    document = response(engine, unique())
    params = {"kv_transfer_params": handoff(engine, document)} if in_two else {}
    answer = post(engine.decode_url, document | {"stream": True} | params)
    events = named_events(answer.text)
    names = [name for name, _ in events]
    deltas = names.count("output_text.delta")
    text = [
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert names == ["created", "in_progress", *(text if deltas else []), "completed"]
    for _, document in events[:2]:
        running = {"output": Is([]), "usage": None, "status": Is("in_progress"), "incomplete_details": None}
        assert_shape(document["response"], shape(engine, **running))
    last = events[-1][1]["response"]
    assert_shape(last, shape(engine, output=Either([MESSAGE], Is([]))))
    usage = last["usage"]
    assert (usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"]) == in_two


@pytest.mark.parametrize("name", WRONG_HANDOFFS)
def test_a_handoff_that_is_lost(engine: Engine, name: str) -> None:
    document = response(engine, unique())
    params = handoff(engine, document)
    answer = post(engine.decode_url, document | {"kv_transfer_params": params | WRONG_HANDOFFS[name]})
    assert answer.status_code == 500
    assert_shape(answer.json(), error(500, "InternalServerError"))
    post(engine.decode_url, document | {"kv_transfer_params": params})


@pytest.mark.parametrize("name", WRONG_HANDOFFS)
def test_a_stream_whose_handoff_is_lost_is_cut(engine: Engine, name: str) -> None:
    document = response(engine, unique())
    params = handoff(engine, document)
    wrong = document | {"kv_transfer_params": params | WRONG_HANDOFFS[name], "stream": True}
    pieces: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError):
        read_stream(engine.decode_url, wrong, pieces)
    assert [name for name, _ in named_events("".join(pieces))] == ["created", "in_progress"]
    post(engine.decode_url, document | {"kv_transfer_params": params})


def test_what_is_not_stored_is_not_there(engine: Engine) -> None:
    known = post(engine.decode_url, response(engine)).json()["id"]
    for answer in (
        httpx.get(f"{engine.decode_url}{PATH}/{known}", timeout=LIMIT_S),
        httpx.post(f"{engine.decode_url}{PATH}/{known}/cancel", timeout=LIMIT_S),
        post(engine.decode_url, response(engine, previous_response_id=known)),
    ):
        assert answer.status_code == 404
        assert_shape(answer.json(), error(404, "invalid_request_error", "response_id"))
    refused = post(engine.decode_url, response(engine, background=True))
    assert_shape(refused.json(), error(400, "invalid_request_error", "background"))
