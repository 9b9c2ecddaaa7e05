"""Requests that mean harm are answered, and the engines that served them live on: the same processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.shared.processes import tree
from tests.real.ask import ANSWERS, LIMIT, PREFILL, chat, post, text_of
from tests.real.conftest import Cluster, samples
from tests.real.test_lifecycle import process_at

PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
DEAD = (502, 503, 504)  # what is answered when workers are lost


@pytest.fixture(scope="module")
def engines(cluster: Cluster) -> dict[str, set[int]]:
    """The processes of each worker, engines included, as they are before any of these requests."""
    text_of(post(cluster.front, chat(PREFILL)))
    return {url: tree(process_at(url)) for url in (cluster.prefill, cluster.decode)}


@pytest.fixture(autouse=True)
def everybody_lives(cluster: Cluster, engines: dict[str, set[int]]) -> Iterator[None]:
    """After each test the same processes answer, and no request was given up for what it does to workers."""
    yield
    answer = post(cluster.front, chat(PREFILL))
    assert text_of(answer) == ANSWERS[PREFILL]
    assert answer.headers["x-baton-path"] == "disaggregated"
    assert {url: tree(process_at(url)) for url in engines} == engines
    assert samples(cluster.admin)["baton_poison_requests_total"] == 0


def send(cluster: Cluster, body: str) -> httpx.Response:
    path = next(path for field, path in PATHS.items() if f'"{field}"' in body)
    content = body.encode("utf-8", "surrogatepass")
    headers = {"content-type": "application/json"}
    return httpx.post(cluster.front + path, content=content, headers=headers, timeout=LIMIT)


# --- transfer fields ----------------------------------------------------------------------------

WHOLE = '"model": "tiny-chat", "prompt": ["a", "b"], "max_tokens": 1'
SPLIT = '"model": "tiny-chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2'
PROBS = f'{SPLIT}, "prompt_logprobs": 0'
VALUES = ('""', '"x"', "0", "1.5", "[]", '["a"]')
SPELLINGS = (
    '"vllm_xargs": {"kv_transfer_params": %s}',
    '"vllm_xargs": {"ec_transfer_params": %s}',
    '"vllm_xargs": {"\\u006bv_transfer_params": %s}',
    '"vllm_xargs": {"kv_transfer_params": 1, "kv_transfer\\u005fparams": %s}',
    '"vllm_xargs": {}, "vllm_\\u0078args": {"kv_transfer_params": %s}',
    '"vllm_xargs": {"kv_transfer_params": %s}, "kv_transfer_params": {"do_remote_prefill": true}',
)


@pytest.mark.parametrize("stream", ["", ', "stream": true'], ids=["whole", "stream"])
@pytest.mark.parametrize("document", [WHOLE, PROBS, SPLIT], ids=["several prompts", "logprobs", "two legs"])
def test_no_transfer_field_reaches_an_engine(cluster: Cluster, document: str, stream: str) -> None:
    for spelling in SPELLINGS:
        for value in VALUES:
            answer = send(cluster, f"{{{document}{stream}, {spelling % value}}}")
            assert answer.status_code == 200, (spelling, value, answer.text)


@pytest.mark.parametrize(
    "value", ['"{\\"kv_transfer_params\\": \\"\\"}"', '[["kv_transfer_params", ""]]', "7"]
)
def test_arguments_that_are_no_object_are_refused(cluster: Cluster, value: str) -> None:
    assert send(cluster, f'{{{WHOLE}, "vllm_xargs": {value}}}').status_code == 400


# --- everything else that is sampled with -------------------------------------------------------

HUGE = 10**30
HOSTILE: list[dict[str, Any]] = [
    {"temperature": -1},
    {"temperature": 1e308},
    {"temperature": 5e-324},
    {"top_p": 0},
    {"top_p": 5e-324},
    {"top_k": -2},
    {"top_k": 2**31},
    {"top_k": HUGE},
    {"min_p": -1},
    {"min_p": 1},
    {"n": 0},
    {"n": -1},
    {"n": 10**6},
    {"best_of": 3, "n": 2},
    {"seed": HUGE},
    {"seed": -(2**63)},
    {"seed": 2**64 - 1},
    {"max_tokens": -1},
    {"max_tokens": HUGE},
    {"max_tokens": 10**6},
    {"min_tokens": -1},
    {"min_tokens": 10**6},
    {"stop": ["" for _ in range(4)]},
    {"stop": ["a"] * 10_000},
    {"stop": "\0"},
    {"stop_token_ids": [-1, 2**31, 2**63 - 1]},
    {"stop_token_ids": [HUGE]},
    {"logit_bias": {"0": 1e308, "1": -1e308}},
    {"logit_bias": {"999999999": 1}},
    {"logit_bias": {"-1": 1}},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [-1]},
    {"allowed_token_ids": [999_999_999]},
    {"bad_words": [""]},
    {"bad_words": ["\0" * 1000]},
    {"logprobs": True, "top_logprobs": -1},
    {"logprobs": True, "top_logprobs": 10**6},
    {"prompt_logprobs": -2},
    {"prompt_logprobs": 10**6},
    {"frequency_penalty": 1e308},
    {"presence_penalty": -1e308},
    {"repetition_penalty": 0},
    {"repetition_penalty": 5e-324},
    {"length_penalty": -1e308, "use_beam_search": True, "n": 2},
    {"use_beam_search": True, "n": 1000},
    {"truncate_prompt_tokens": 0},
    {"truncate_prompt_tokens": -(2**31)},
    {"priority": HUGE},
    {"priority": -(2**63)},
    {"cache_salt": ""},
    {"cache_salt": "\0" * 10_000},
    {"thinking_token_budget": -5},
    {"thinking_token_budget": 2**31},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"grammar": "root ::= root"}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": {"type": "object", "$ref": "#/nowhere"}}},
    {"repetition_detection": {"max_pattern_size": -1, "min_count": -1}},
    {"logits_processors": ["os.system"]},
    {"vllm_xargs": {"a": HUGE}},
    {"vllm_xargs": {"a": {"deep": {}}}},
    {"vllm_xargs": {"kv_cache_report_mode": [1]}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": "x"}},
    {"request_id": "../" * 1000},
    {"mm_processor_kwargs": {"a": HUGE}},
    {"chat_template_kwargs": {"kv_transfer_params": "", "messages": 1}},
]


@pytest.mark.parametrize("api", PATHS)
def test_hostile_fields_end_no_engine(cluster: Cluster, api: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}[api]
    told: dict[str, int] = {}
    for fields in HOSTILE:
        for is_whole in (False, True) if api == "prompt" else (False,):
            document = {"model": "tiny-chat", api: [prompt, prompt] if is_whole else prompt, "max_tokens": 3}
            body = json.dumps({**document, **fields})
            told[body] = send(cluster, body).status_code
            assert told[body] not in DEAD, body
    print(json.dumps(told, indent=1))
