from __future__ import annotations

from typing import Any

import pytest

from worker.sim import protocol, text
from worker.sim.protocol import ChatRequest, CompletionRequest, Job, Malformed, Refused
from worker.sim.settings import Settings

SETTINGS = Settings(model_name="m", block_size=16, num_blocks=8)  # 128 tokens


def chat_job(**fields: Any) -> Job:
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0} | fields
    return protocol.chat_job(protocol.parse(body, ChatRequest), SETTINGS, None)


def completion_job(prompt: Any = "Hello", **fields: Any) -> Job:
    body = {"prompt": prompt, "temperature": 0} | fields
    return protocol.completion_job(protocol.parse(body, CompletionRequest), SETTINGS, None)


def test_tokens_by_default() -> None:
    assert completion_job().sampling.max_tokens == 16
    assert completion_job(max_tokens=None).sampling.max_tokens == 16
    job = chat_job()
    assert job.sampling.max_tokens == 128 - len(job.prompts[0].tokens)


def test_max_tokens_is_cut_to_the_room() -> None:
    assert completion_job([5] * 120, max_tokens=100).sampling.max_tokens == 8
    assert chat_job(max_tokens=3, max_completion_tokens=5).sampling.max_tokens == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 7.0, "stream": "yes", "stream_options": {"include_usage": 1}},
        {"max_tokens": " 7 ", "stream": "ON", "stream_options": {"include_usage": "t"}},
        {"max_tokens": "7.0", "stream": 1.0, "stream_options": {"include_usage": "1"}},
    ],
)
def test_numbers_and_switches_are_taken_in_pydantics_spellings(fields: dict[str, Any]) -> None:
    job = chat_job(**fields)
    assert (job.sampling.max_tokens, job.is_stream, job.include_usage) == (7, True, True)


@pytest.mark.parametrize(
    "fields", [{"stream": "perhaps"}, {"max_tokens": 1.5}, {"stream_options": {"include_usage": 2}}]
)
def test_others_are_malformed(fields: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        chat_job(**fields)


def test_the_forms_of_a_prompt() -> None:
    hello = text.encode("Hello")
    assert [prompt.tokens for prompt in completion_job("Hello").prompts] == [hello]
    assert [prompt.tokens for prompt in completion_job(["Hello"]).prompts] == [hello]
    assert [prompt.tokens for prompt in completion_job(hello).prompts] == [hello]
    assert [prompt.tokens for prompt in completion_job([hello, hello]).prompts] == [hello, hello]


def test_chat_parts_and_what_is_not_text_are_in_the_prompt() -> None:
    def prompt(*messages: dict[str, Any], **fields: Any) -> list[int]:
        return list(chat_job(messages=list(messages), **fields).prompts[0].tokens)

    user = {"role": "user"}
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    plain = prompt(user | {"content": "Hello"})
    assert prompt(user | {"content": parts}) == plain
    assert prompt(user | {"content": [*parts, image]}) != plain
    assert prompt(user | {"content": "Hello", "name": "Ada"}) != plain
    assert prompt(user | {"content": "Hello"}, tools=[{"type": "function"}]) != plain
    assert (
        prompt(user | {"content": "Hello"}, add_generation_prompt=False)
        == plain[: -len(text.encode("<|im_start|>assistant\n"))]
    )


def test_token_ids_may_come_with_the_handoff() -> None:
    kv = {"do_remote_prefill": True, "prompt_token_ids": [1, 2, 3]}
    assert chat_job(kv_transfer_params=kv).prompts[0].tokens == [1, 2, 3]


def test_beam_search_drops_the_handoff() -> None:
    job = completion_job(use_beam_search=True, n=2, kv_transfer_params={"do_remote_prefill": True})
    assert job.prompts[0].kv is None
    assert job.choices == 2


def test_prompt_logprobs_read_no_cache() -> None:
    assert not completion_job(prompt_logprobs=0).prompts[0].reads_cache


def test_greedy_is_temperature_zero() -> None:
    assert completion_job(temperature=0).sampling.seed is None
    assert completion_job(temperature=None, seed=3).sampling.seed == "3"


def test_ids() -> None:
    request = protocol.parse({"messages": [{"role": "user"}], "request_id": "own"}, ChatRequest)
    assert protocol.chat_job(request, SETTINGS, "header").request_id == "chatcmpl-header"
    assert protocol.chat_job(request, SETTINGS, None).request_id == "chatcmpl-own"
    job = completion_job(["a", "b"], request_id="own")
    assert [prompt.request_id[:11] for prompt in job.prompts] == ["cmpl-own-0-", "cmpl-own-1-"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "other"}, "model", "The model `other` does not exist. Valid aliases: m."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": 129}, "max_tokens", "max_tokens=129 cannot be greater than max_model_len=128."),
        ({"min_tokens": 9, "max_tokens": 8}, None, "min_tokens must be less than or equal to max_tokens=8"),
        ({"n": 0}, None, "n must be at least 1, got 0."),
        ({"n": 10**9}, None, "n must be at most 16384"),
        ({"n": 2}, None, "n must be 1 when using greedy sampling, got 2."),
        ({"temperature": -1}, "temperature", "temperature must be non-negative, got -1.0."),
        ({"stream_options": {"include_usage": True}}, "stream_options", "Stream options can only be"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "`prompt_logprobs` are not available"),
        ({"prompt_logprobs": -2}, "prompt_logprobs", "`prompt_logprobs` must be a positive value or -1."),
    ],
)
@pytest.mark.parametrize("job", [chat_job, completion_job])
def test_what_is_refused(job: Any, fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(Refused, match=message.replace("(", r"\(")) as refused:
        job(**fields)
    assert refused.value.param == param
    assert refused.value.status == (404 if param == "model" else 400)
    assert not isinstance(refused.value, Malformed)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        (None, "prompt"),
        ([], None),
        ([""], None),
        ([5] * 129, "input_tokens"),
        ([1 << 26], None),
    ],
)
def test_refused_prompts(prompt: Any, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        completion_job(prompt)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("job", "fields", "param"),
    [
        (chat_job, {"messages": "x"}, "body.messages"),
        (chat_job, {"messages": [{"content": "x"}]}, "body.messages.0.role"),
        (chat_job, {"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        (chat_job, {"stream": "maybe"}, "body.stream"),
        (completion_job, {"prompt": {"a": 1}}, "body.prompt"),
        (completion_job, {"prompt": [[1], "a"]}, "body.prompt"),
        (completion_job, {"max_tokens": "x"}, "body.max_tokens"),
        (completion_job, {"stop": 5}, "body.stop"),
        (completion_job, {"kv_transfer_params": []}, "body.kv_transfer_params"),
    ],
)
def test_malformed(job: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Malformed) as malformed:
        job(**fields)
    assert malformed.value.param == param
    assert malformed.value.kind == "Bad Request"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(Malformed) as malformed:
        protocol.parse({}, ChatRequest)
    assert malformed.value.param == "body.messages"


def test_no_messages() -> None:
    with pytest.raises(Refused, match="empty conversation"):
        chat_job(messages=[])


def test_chat_logprobs() -> None:
    assert chat_job(logprobs=True, top_logprobs=3).logprobs == 3
    assert chat_job(logprobs=True).logprobs == 0
    assert chat_job().logprobs is None
    with pytest.raises(Refused, match="when using `top_logprobs`"):
        chat_job(top_logprobs=2)
