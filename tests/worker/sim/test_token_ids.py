"""What the contract of tokenising once leaves to each engine, and how the simulated one shows it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.worker.sim.asking import ask, chat, completion, path_of, text_of
from tests.worker.sim.workers import Worker, running
from worker.sim import text
from worker.token_ids import pack

MSGPACK = {"content-type": "application/json", "x-msgpack": "1"}
IDS = text.encode("Tokenised elsewhere")
BASE64 = base64.b64encode(pack(IDS)).decode()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with running(transport="msgpack") as worker:
        yield worker


@pytest.fixture(scope="module")
def json_worker() -> Iterator[Worker]:
    with running(transport="json") as worker:
        yield worker


def tokenized(worker: Worker) -> float:
    return worker.metric("sim:tokenized_prompts_total")


def test_text_is_tokenized_and_counted(worker: Worker) -> None:
    before = tokenized(worker)
    for document in (chat(), completion(), completion(["one", "two"]), completion(IDS)):
        assert ask(worker, document).status_code == 200
    assert tokenized(worker) == before + 4


@pytest.mark.parametrize("document", [chat(), completion()], ids=["chat", "completion"])
def test_packed_ids_are_the_prompt(worker: Worker, document: dict[str, Any]) -> None:
    expected, before = text_of(ask(worker, completion(IDS))), tokenized(worker)
    answer = ask(worker, document | {"kv_transfer_params": {"prompt_token_ids": BASE64}})
    assert text_of(answer) == expected
    assert answer.json()["usage"]["prompt_tokens"] == len(IDS)
    assert tokenized(worker) == before


def test_a_completion_needs_no_prompt_beside_them(worker: Worker) -> None:
    document = {"model": "sim-model", "max_tokens": 2, "kv_transfer_params": {"prompt_token_ids": BASE64}}
    assert worker.post("/v1/completions", document).json()["usage"]["prompt_tokens"] == len(IDS)


def test_a_chat_needs_no_messages_beside_them(worker: Worker) -> None:
    document = chat(messages=[], kv_transfer_params={"prompt_token_ids": IDS})
    assert ask(worker, document).json()["usage"]["prompt_tokens"] == len(IDS)


def test_messages_with_more_than_text_are_tokenized(worker: Worker) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    document = chat(messages=[{"role": "user", "content": [image]}])
    expected = text_of(ask(worker, document))
    assert text_of(ask(worker, document | {"kv_transfer_params": {"prompt_token_ids": IDS}})) == expected


def test_bytes_anywhere_else_are_refused(worker: Worker) -> None:
    ids = pack(IDS)
    for fields in ({"user": ids}, {"kv_transfer_params": {"other": ids, "prompt_token_ids": ids}}):
        content = msgspec.msgpack.encode(chat(**fields))
        answer = worker.client.post(path_of(chat()), content=content, headers=MSGPACK)
        assert answer.status_code == 400


def test_with_json_no_packed_ids_are_taken(json_worker: Worker) -> None:
    answer = ask(json_worker, chat(kv_transfer_params={"prompt_token_ids": BASE64}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params.prompt_token_ids"


@pytest.mark.parametrize("form", ["bin", "base64", "x"])
def test_with_json_no_packed_ids_are_given(json_worker: Worker, form: str) -> None:
    answer = ask(json_worker, chat(return_token_ids=True), **{"X-Token-Ids": form})
    assert isinstance(answer.json()["prompt_token_ids"], list)


def test_with_orjson_no_bytes_are_given() -> None:
    with running(transport="orjson") as worker:
        answer = ask(worker, chat(return_token_ids=True), **{"X-Token-Ids": "bin"})
    assert isinstance(answer.json()["prompt_token_ids"], list)


def test_ids_that_nobody_asked_for(worker: Worker) -> None:
    answer = ask(worker, chat(), **{"X-Token-Ids": "bin"})
    assert (answer.headers["content-type"], answer.json()["prompt_token_ids"]) == ("application/json", None)


@pytest.mark.parametrize("document", [chat(), completion()], ids=["chat", "completion"])
def test_a_stream_gives_lists(worker: Worker, document: dict[str, Any]) -> None:
    fields = {"return_token_ids": True, "stream": True}
    answer = ask(worker, document | fields, **{"X-Token-Ids": "bin"})
    assert b'"prompt_token_ids":[' in answer.content
