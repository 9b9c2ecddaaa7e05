"""The endpoints over a real socket. Shapes are checked by the contract suite; here it is the values."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from tests.contract.engines import CHAT, events
from tests.waiting import wait_for
from tests.worker.sim.asking import ask, cached_tokens, chat, completion, text_of
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.settings import Latency

MAKES = [chat, completion]


@pytest.mark.parametrize("make", MAKES)
def test_streamed_and_whole_say_the_same(decoder: Worker, make: Any) -> None:
    document = make("Same", max_tokens=40)
    assert text_of(ask(decoder, document | {"stream": True})) == text_of(ask(decoder, document)) != ""


def test_a_token_is_an_event(decoder: Worker) -> None:
    document = chat("Count me", max_tokens=7, ignore_eos=True, stream=True)
    role, *tokens = events(ask(decoder, document))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(tokens) == 7
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None] * 6 + ["length"]


def test_usage_in_a_stream(decoder: Worker) -> None:
    document = completion("Usage", max_tokens=5, ignore_eos=True, stream=True)
    last = events(ask(decoder, document | {"stream_options": {"include_usage": True}}))[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 5
    assert "usage" not in events(ask(decoder, document))[-1]


def test_usage_all_along(decoder: Worker) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(ask(decoder, chat("All along", max_tokens=3, stream=True, stream_options=options)))
    assert [event["usage"]["completion_tokens"] for event in found] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("make", MAKES)
def test_a_prefix_is_cached(make: Any) -> None:
    with running(block_size=4) as worker:
        document = make("The quick brown fox jumps over the lazy dog. " * 3)
        assert cached_tokens(ask(worker, document)) == 0
        again = ask(worker, document)
        prompt_tokens = again.json()["usage"]["prompt_tokens"]
        assert cached_tokens(again) == (prompt_tokens - 1) // 4 * 4
        assert worker.metric("vllm:prefix_cache_queries_total") == 2 * prompt_tokens
        assert worker.metric("vllm:prefix_cache_hits_total") == cached_tokens(again)
        salted = ask(worker, document | {"cache_salt": "pepper"})
        assert cached_tokens(salted) == 0


def test_several_prompts(decoder: Worker) -> None:
    prompts = ["one", "two", "three"]
    answer = ask(decoder, completion(prompts)).json()
    alone = [text_of(ask(decoder, completion(prompt))) for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == alone
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    streamed = events(ask(decoder, completion(prompts, stream=True)))
    for index, said in enumerate(alone):
        pieces = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == said


def test_token_ids_as_prompt_and_in_the_answer(decoder: Worker) -> None:
    ids = decoder.post("/tokenize", {"prompt": "Prefill is"}).json()["tokens"]
    document = completion(ids, return_token_ids=True)
    (choice,) = ask(decoder, document).json()["choices"]
    assert choice["text"] == text_of(ask(decoder, completion("Prefill is")))
    assert choice["prompt_token_ids"] == ids
    assert decoder.post("/detokenize", {"tokens": choice["token_ids"]}).json()["prompt"] == choice["text"]
    streamed = [event["choices"][0] for event in events(ask(decoder, document | {"stream": True}))]
    assert streamed[0]["prompt_token_ids"] == ids
    assert streamed[1]["prompt_token_ids"] is None
    assert [token for piece in streamed for token in piece["token_ids"]] == choice["token_ids"]


def test_token_ids_of_a_chat(decoder: Worker) -> None:
    document = chat("Ids", return_token_ids=True)
    answer = ask(decoder, document).json()
    ids = decoder.post("/tokenize", {"messages": document["messages"]}).json()["tokens"]
    assert answer["prompt_token_ids"] == ids
    role, first, *_ = events(ask(decoder, document | {"stream": True}))
    assert role["prompt_token_ids"] == ids
    assert first["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"][:1]


def test_echo(decoder: Worker) -> None:
    said = text_of(ask(decoder, completion("Say: ")))
    assert text_of(ask(decoder, completion("Say: ", echo=True))) == "Say: " + said
    assert text_of(ask(decoder, completion("Say: ", echo=True, stream=True))) == "Say: " + said
    only = ask(decoder, completion("Say: ", echo=True, max_tokens=0, logprobs=1)).json()["choices"][0]
    assert only["text"] == "Say: "
    assert only["logprobs"]["token_logprobs"][0] is None
    assert "".join(only["logprobs"]["tokens"]) == "Say: "


def test_logprobs(decoder: Worker) -> None:
    (choice,) = ask(decoder, chat("Likely", logprobs=True, top_logprobs=2)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)
    (choice,) = ask(decoder, completion("Likely", logprobs=2)).json()["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][1] == len(choice["logprobs"]["tokens"][0])


def test_beam_search(decoder: Worker) -> None:
    answer = ask(decoder, completion("Beams", use_beam_search=True, n=3)).json()
    assert answer["choices"][0]["text"] == text_of(ask(decoder, completion("Beams")))
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    assert ask(decoder, completion(use_beam_search=True, n=2, stream=True)).status_code == 400


def test_stop(decoder: Worker) -> None:
    word = text_of(ask(decoder, chat("Stop there"))).split()[0]
    document = chat("Stop there", stop=word)
    (choice,) = ask(decoder, document).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        " ",
        "stop",
        word,
    )
    last = events(ask(decoder, document | {"stream": True}))[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", word)


def test_answers_are_not_all_ascii_and_arrive_whole(decoder: Worker) -> None:
    documents = [completion(f"Alphabet {n}", max_tokens=47, stream=True) for n in range(20)]
    said = "".join(text_of(ask(decoder, document)) for document in documents)
    assert not said.isascii()
    assert "\ufffd" not in said


# --- errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{bad", "body.1"),
        (b"", "body"),
        (b"[1]", "body"),
        (b'{"model": "sim-model"}', "body.messages"),
    ],
)
def test_bodies_that_are_no_request(decoder: Worker, body: bytes, param: str) -> None:
    answer = decoder.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("Bad Request", param, 400)
    assert error["message"].startswith("1 validation error:\n")


def test_another_content_type(decoder: Worker) -> None:
    answer = decoder.client.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "Unsupported Media Type" in answer.json()["error"]["message"]


def test_odd_characters_are_survived(decoder: Worker) -> None:
    """Lone surrogates are JSON, and no text."""
    odd = r'{"model": "sim-model", "prompt": "\ud800", "max_tokens": 2, "echo": true}'
    headers = {"content-type": "application/json"}
    assert decoder.client.post("/v1/completions", content=odd, headers=headers).status_code == 200
    unknown = odd.replace("sim-model", r"\udfff")
    assert decoder.client.post("/v1/completions", content=unknown, headers=headers).status_code == 404
    role = r'{"messages": [{"role": "user", "content": [{"type": "\ud800"}], "name": "\ud800"}]}'
    assert decoder.client.post(CHAT, content=role, headers=headers).status_code == 200


def test_unknown_paths(decoder: Worker) -> None:
    assert decoder.client.get("/nowhere").status_code == 404
    assert decoder.client.get(CHAT).status_code == 405


# --- the rest


def test_what_it_says_of_itself() -> None:
    with running(role="decode", block_size=8, num_blocks=100, transport="msgpack") as worker:
        assert worker.client.get("/baton/info").json() == {
            "role": "decode",
            "model": MODEL,
            "decodes": ["json", "msgpack"],
            "engine": "sim",
            "engine_version": "0.1.0",
            "block_size": 8,
            "kv_tokens": 800,
            "max_model_len": 800,
            "token_ids": ["list", "base64", "bin"],
            "kv_lease_s": 30.0,
            "path": MODEL,
            "dtype": "bfloat16",
            "kv_dtype": "auto",
            "tp": 1,
            "connector": "sim",
        }
        (card,) = worker.client.get("/v1/models").json()["data"]
        assert (card["id"], card["max_model_len"]) == (MODEL, 800)
        assert worker.client.get("/health").content == b""
        assert worker.client.get("/ping").status_code == worker.client.post("/ping").status_code == 200


@pytest.mark.parametrize("transport", ["json", "orjson", "msgpack"])
def test_transports(transport: str) -> None:
    document = chat("Transported")
    with running(transport=transport, record=1) as worker:
        said = text_of(ask(worker, document))
        headers = {"content-type": "application/json", "x-msgpack": "1"}
        packed = worker.client.post(CHAT, content=msgspec.msgpack.encode(document), headers=headers)
        assert packed.status_code == (200 if transport == "msgpack" else 400)
        if transport == "msgpack":
            assert text_of(packed) == said
            (recorded,) = worker.client.get("/sim/requests").json()
            assert recorded["body"] == document
            assert base64.b64decode(recorded["raw"]) == msgspec.msgpack.encode(document)


def test_bodies_are_recorded_as_they_came() -> None:
    with running(record=2) as worker:
        bodies = [json.dumps(chat(f"{number}"), indent=number).encode() for number in range(3)]
        for body in bodies:
            worker.client.post(CHAT, content=body, headers={"content-type": "application/json", "x-own": "1"})
        recorded = worker.client.get("/sim/requests").json()
        assert [base64.b64decode(entry["raw"]) for entry in recorded] == bodies[1:]
        assert [entry["body"] for entry in recorded] == [json.loads(body) for body in bodies[1:]]
        assert recorded[0]["headers"]["x-own"] == "1"


def test_the_journal_shows_no_secrets(decoder: Worker) -> None:
    ask(decoder, chat("Secret"), **{"X-Request-Id": "r-1", "Authorization": "Bearer secret"})
    last = decoder.ledger()["requests"][-1]
    assert last["id"] == "chatcmpl-r-1"
    assert last["headers"]["x-request-id"] == "r-1"
    assert "authorization" in last["header_names"]
    assert "secret" not in json.dumps(last)
    assert (last["leg"], last["outcome"], last["path"]) == ("aggregated", "done", CHAT)


def test_keys() -> None:
    with running(api_keys=("one", "two")) as worker:
        assert ask(worker, chat()).status_code == 401
        assert ask(worker, chat()).json() == {"error": "Unauthorized"}
        assert ask(worker, chat(), Authorization="Bearer three").status_code == 401
        assert ask(worker, chat(), Authorization="Bearer two").status_code == 200
        assert worker.client.get("/v1/models").status_code == 401
        assert worker.client.get("/health").status_code == 200


def test_gauges_tell_what_runs_and_what_waits() -> None:
    latency = Latency(decode_ms_per_token=20)
    slow = chat("Slow", max_tokens=100_000, ignore_eos=True, stream=True)
    with running(latency=latency, max_num_seqs=1) as worker:
        with worker.client.stream("POST", CHAT, json=slow) as answer:
            lines = answer.iter_lines()
            next(lines)
            with worker.client.stream("POST", CHAT, json=slow):  # a stream's head comes before its turn
                wait_for(lambda: worker.metric("vllm:num_requests_waiting") == 1, "the queue")
                assert worker.metric("vllm:num_requests_running") == 1
                assert 0 < worker.metric("vllm:kv_cache_usage_perc") < 1
        wait_for(lambda: worker.ledger()["in_flight"] == 0, "both aborts")


def test_metrics_are_there_before_the_first_request() -> None:
    with running() as worker:
        found = worker.client.get("/metrics").text
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "nixl_num_kv_expired_reqs_total",
            "prompt_tokens_total",
            "generation_tokens_total",
            "nixl_num_failed_transfers_total",
            "nixl_xfer_time_seconds_count",
        ):
            assert f'\nvllm:{name}{{engine="0",model_name="{MODEL}"}} 0.0' in found


def test_many_at_once() -> None:
    """Without latency and with it: everybody gets their own answer."""
    documents = [completion(f"Number {number}", max_tokens=20) for number in range(40)]
    with running() as quick, running(latency=Latency(decode_ms_per_token=2)) as slow:
        expected = [text_of(ask(quick, document)) for document in documents]
        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(lambda document: text_of(ask(slow, document)), documents))
    assert found == expected


def test_the_official_shape_of_a_connection(decoder: Worker) -> None:
    """Kept open between requests, in streams too."""
    with httpx.Client(base_url=decoder.url, limits=httpx.Limits(max_connections=1)) as client:
        for stream in (True, False, True):
            assert client.post(CHAT, json=chat(stream=stream)).status_code == 200
