"""Two real vLLM workers: right answers, whatever the form of the request and the transport."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.contract.engines import events
from tests.real.ask import (
    ANSWERS,
    LIMIT,
    NOTHING,
    PREFILL,
    about_passage,
    chat,
    comparable,
    completion,
    post,
    text_of,
)
from tests.real.conftest import DATA, Cluster, metric, orchestrator

TRANSPORTS = ["json", "orjson", "msgpack"]


@pytest.fixture(scope="module", params=TRANSPORTS)
def front(request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: Any) -> Iterator[str]:
    """The same workers behind an orchestrator with each transport."""
    if request.param == "msgpack":
        yield cluster.front
        return
    with orchestrator(cluster, request.param, tmp_path_factory.mktemp("orchestrator")) as url:
        yield url


def assert_transferred(answer: httpx.Response) -> None:
    assert answer.headers["x-baton-path"] == "disaggregated"
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.headers["x-baton-kv"] == "transferred"


@pytest.mark.parametrize("stream", [False, True])
def test_chat(front: str, cluster: Cluster, stream: bool) -> None:
    answer = post(front, chat(PREFILL, stream=stream))
    assert text_of(answer) == ANSWERS[PREFILL]
    assert_transferred(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_completion(front: str, cluster: Cluster, stream: bool) -> None:
    answer = post(front, completion(PREFILL, stream=stream))
    assert text_of(answer).strip() == ANSWERS[PREFILL]
    assert_transferred(answer)


def test_all_questions_at_once(cluster: Cluster) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda question: post(cluster.front, chat(question)), ANSWERS)
        given = {question: text_of(answer) for question, answer in zip(ANSWERS, answers, strict=True)}
    assert given == ANSWERS


def test_prompts_of_several_blocks_at_once(front: str, cluster: Cluster) -> None:
    """The prompts differ in their first block only: two hand-offs that were swapped would show."""
    entries = DATA["about_passage"]
    with ThreadPoolExecutor(len(entries)) as threads:
        answers = list(threads.map(lambda entry: post(front, chat(about_passage(entry))), entries))
    assert [text_of(answer) for answer in answers] == [entry["answer"] for entry in entries]
    assert answers[0].json()["usage"]["prompt_tokens"] > 128  # a block of vLLM on a CPU
    for answer in answers:
        assert_transferred(answer)


def test_a_prompt_of_token_ids(front: str, cluster: Cluster) -> None:
    ids = post(cluster.decode, completion(PREFILL, return_token_ids=True)).json()["choices"][0]
    answer = post(front, completion(PREFILL) | {"prompt": ids["prompt_token_ids"]})
    assert text_of(answer).strip() == ANSWERS[PREFILL]
    assert_transferred(answer)


# --- the same as one worker alone ---------------------------------------------------------------

UNKNOWN = "Tell me a story about a lighthouse, a keeper and the sea, and begin it with the weather. " * 12


@pytest.mark.parametrize(
    "document",
    [
        chat(PREFILL),
        chat(UNKNOWN, max_tokens=24),
        completion(UNKNOWN, max_tokens=24),
        chat(PREFILL, logprobs=True, top_logprobs=3, max_tokens=8),
        completion(PREFILL, logprobs=2, max_tokens=8),
        chat(PREFILL, n=2, seed=7, temperature=0.01, max_tokens=8),
        chat("Count.", max_tokens=24, structured_outputs={"regex": "(one|two), (three|four)"}),
        chat(
            "What is the weather in Paris?",
            max_tokens=48,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "parameters": {
                            "type": "object",
                            "properties": {"city": {"enum": ["Paris", "Rome"]}},
                            "required": ["city"],
                            "additionalProperties": False,
                        },
                    },
                }
            ],
        ),
    ],
    ids=["known", "unknown", "completion", "logprobs", "completion-logprobs", "n", "structured", "tool"],
)
def test_a_whole_answer_is_what_one_worker_answers(cluster: Cluster, document: dict[str, Any]) -> None:
    ours, alone = post(cluster.front, document), post(cluster.decode, document)
    assert_transferred(ours)
    assert answer_of(ours) == answer_of(alone)


def answer_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    document = comparable(answer.json())
    del document["usage"]["prompt_tokens_details"]  # caches differ between workers
    for choice in document["choices"]:
        for call in choice.get("message", {}).get("tool_calls") or []:
            del call["id"]
    return document


@pytest.mark.parametrize("include_usage", [None, False, True])
@pytest.mark.parametrize("make", [chat, completion])
def test_a_stream_is_what_one_worker_streams(cluster: Cluster, make: Any, include_usage: bool | None) -> None:
    options = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    document = make(PREFILL, stream=True, max_tokens=12, **options)
    ours, alone = post(cluster.front, document), post(cluster.decode, document)
    assert_transferred(ours)
    assert joined(ours) == joined(alone)


def joined(answer: httpx.Response) -> Any:
    """A stream's text, and its events that end a choice or tell the usage.

    How many tokens share an event, the last one included, is up to timing.
    """
    text, ends = text_of(answer), []
    for event in map(comparable, events(answer)):
        event.pop("system_fingerprint", None)  # vLLM moves it to the usage event when there is one
        if event.get("usage"):
            del event["usage"]["prompt_tokens_details"]
        for choice in event["choices"]:
            (choice.get("delta") or choice).pop("content" if "delta" in choice else "text", None)
        if all(choice["finish_reason"] for choice in event["choices"]):
            ends.append(event)
    return text, ends


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_whose_first_token_ends_the_answer(cluster: Cluster, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = post(cluster.front, chat(NOTHING, **options))
    assert text_of(answer) == ""
    assert finish(answer) == ("stop", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_the_first_token(cluster: Cluster, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    first = text_of(post(cluster.decode, chat(PREFILL, max_tokens=1)))
    document = chat(PREFILL, stop=[first], **options)
    ours, alone = post(cluster.front, document), post(cluster.decode, document)
    assert text_of(ours) == text_of(alone) == ""
    assert finish(ours) == finish(alone) == ("stop", 1)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_one_token_is_one_token(cluster: Cluster, field: str) -> None:
    document = chat(PREFILL)
    del document["max_tokens"]
    answer = post(cluster.front, document | {field: 1})
    assert finish(answer) == ("length", 1)
    assert ANSWERS[PREFILL].startswith(text_of(answer))


def finish(answer: httpx.Response) -> tuple[str, int]:
    """(finish_reason, completion_tokens) of an answer, streamed or not."""
    documents = [answer.json()] if answer.text.startswith("{") else events(answer)
    choices = [choice for document in documents for choice in document["choices"]]
    (reason,) = {choice["finish_reason"] for choice in choices} - {None}
    return reason, documents[-1]["usage"]["completion_tokens"]


def test_the_usage_has_the_prefill_workers_cached_tokens(cluster: Cluster) -> None:
    document = chat(about_passage(DATA["about_passage"][0]))
    post(cluster.front, document)
    details = post(cluster.front, document).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > 0  # whole blocks of the prefill worker's prefix cache
    assert details["cached_tokens"] % 128 == 0


# --- what goes to one worker --------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        completion(PREFILL) | {"prompt": [completion(ask)["prompt"] for ask in list(ANSWERS)[:3]]},
        completion(PREFILL, use_beam_search=True, n=2, max_tokens=8),
        completion(PREFILL, prompt_logprobs=1, max_tokens=8),
        chat(PREFILL, prompt_logprobs=1, max_tokens=8),
        completion(PREFILL, echo=True, max_tokens=8),
    ],
    ids=["prompts", "beam-search", "prompt-logprobs", "chat-prompt-logprobs", "echo"],
)
def test_what_cannot_be_handed_over_is_answered_by_one_worker(
    cluster: Cluster, document: dict[str, Any]
) -> None:
    ours, alone = post(cluster.front, document), post(cluster.decode, document)
    assert ours.headers["x-baton-path"] == "aggregated"
    assert ours.headers["x-baton-kv"] == "local"
    assert answer_of(ours) == answer_of(alone)


def test_a_list_of_one_prompt_is_handed_over(cluster: Cluster) -> None:
    document = completion(PREFILL)
    answer = post(cluster.front, document | {"prompt": [document["prompt"]]})
    assert text_of(answer).strip() == ANSWERS[PREFILL]
    assert_transferred(answer)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1_000_000},
        {"temperature": -1},
        {"n": 0},
        {"stop": {"not": "a string"}},
        {"min_tokens": 50, "max_tokens": 5},
        {"messages": []},
        {"messages": [{"role": "user", "content": "too long " * 5000}]},
    ],
    ids=["max-tokens", "temperature", "n", "stop", "min-tokens", "no-messages", "too-long"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_workers_refusal_reaches_the_client(cluster: Cluster, fields: dict[str, Any], stream: bool) -> None:
    """Also what only the decode worker can refuse, when the blocks are pinned already."""
    document = chat(PREFILL, stream=stream) | fields
    ours, alone = post(cluster.front, document), post(cluster.decode, document)
    assert ours.status_code == alone.status_code == 400
    assert ours.json() == alone.json()


def test_a_client_that_leaves_frees_both_workers(cluster: Cluster) -> None:
    document = chat(UNKNOWN, stream=True, max_tokens=2000, ignore_eos=True)
    url = f"{cluster.front}/v1/chat/completions"
    before = metric(cluster.decode, "vllm:generation_tokens_total")
    with httpx.stream("POST", url, json=document, timeout=LIMIT) as answer:
        next(answer.iter_bytes())
    while metric(cluster.decode, "vllm:num_requests_running"):
        time.sleep(0.05)  # the test's own limit ends this
    assert metric(cluster.decode, "vllm:generation_tokens_total") - before < 2000


# --- the official client ------------------------------------------------------------------------


def test_the_openai_client(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.front}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny-chat"]
        messages: Any = [{"role": "user", "content": PREFILL}]
        whole = client.chat.completions.create(model="tiny-chat", messages=messages, temperature=0)
        assert whole.choices[0].message.content == ANSWERS[PREFILL]
        stream = client.chat.completions.create(
            model="tiny-chat",
            messages=messages,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == ANSWERS[PREFILL]
        assert chunks[-1].usage is not None
        prompt = f"Question: {PREFILL}\nAnswer:"
        plain = client.completions.create(
            model="tiny-chat", prompt=prompt, temperature=0, max_tokens=80, stop="\n"
        )
        assert plain.choices[0].text.strip() == ANSWERS[PREFILL]
        with pytest.raises(openai.NotFoundError, match="tiny-chat"):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny-chat", messages=messages, temperature=-1)


# --- what is shown of it ------------------------------------------------------------------------


def test_models_and_workers_are_described(cluster: Cluster) -> None:
    (model,) = httpx.get(f"{cluster.front}/v1/models").json()["data"]
    assert model["max_model_len"] == 4096
    workers = httpx.get(f"{cluster.admin}/admin/workers").text
    for fact in ("tiny-chat/prefill/0", "tiny-chat/decode/0", '"msgpack"', '"block_size":128'):
        assert fact in workers
    assert metric(cluster.admin, "baton_kv_transfers_total") >= 0


def test_transfers_are_counted(cluster: Cluster) -> None:
    def transferred() -> float:
        lines = httpx.get(f"{cluster.admin}/metrics").text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("baton_kv_transfers_total") and 'outcome="transferred"' in line
        )

    before = transferred()
    post(cluster.front, chat(PREFILL))
    text_of(post(cluster.front, chat(PREFILL, stream=True)))
    assert transferred() == before + 2
