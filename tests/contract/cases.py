"""The contract: what the orchestrator may expect of a vLLM worker, simulated or real.

Shapes and rules, no words: each engine has a model of its own. `engine` is a fixture of whoever imports this.
"""

from __future__ import annotations

import json
import socket
import uuid
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.contract.engines import CHAT, COMPLETION, LIMIT_S, Engine, events, metric
from tests.contract.shapes import Each, Either, Is, assert_shape
from tests.waiting import wait_for

# --- shapes, as vLLM 0.32 has them

MAYBE_TEXT = Either(str, None)
MAYBE_IDS = Either([int], None)
FINISH = Either(Is("stop"), Is("length"))
PLAIN_USAGE = {"prompt_tokens": int, "total_tokens": int, "completion_tokens": int}
USAGE = PLAIN_USAGE | {
    "prompt_tokens_details": {
        "cached_tokens": int,
        "created_cache_tokens": Either(int, None),
        "multimodal_tokens": None,
    },
    "completion_tokens_details": None,
}
HANDOFF = {
    "do_remote_prefill": Is(True),
    "do_remote_decode": Is(False),
    "remote_block_ids": [[int]],
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": str,
    "remote_port": int,
    "tp_size": int,
    "dcp_size": int,
    "pp_size": int,
    "remote_num_tokens": int,
    "remote_blocks_expiry_time": None,
    "transfer_mode": Is("pull"),
    "remote_prefill_cached_tokens": int,
}
TOKEN_LOGPROB = {"token": str, "logprob": float, "bytes": Either([int], Is([]))}
CHAT_LOGPROBS = {"content": [TOKEN_LOGPROB | {"top_logprobs": Either([TOKEN_LOGPROB], Is([]))}]}
COMPLETION_LOGPROBS = {
    "text_offset": [int],
    "token_logprobs": [Either(float, None)],
    "tokens": [str],
    "top_logprobs": [Either(Each(float), None)],
}
PROMPT_LOGPROBS = [Either(Each({"logprob": float, "rank": int, "decoded_token": str}), None)]


def chat_answer(**changed: Any) -> dict[str, Any]:
    choice = {
        "index": int,
        "message": {
            "role": Is("assistant"),
            "content": str,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        },
        "logprobs": changed.pop("logprobs", None),
        "finish_reason": FINISH,
        "stop_reason": Either(str, int, None),
        "token_ids": changed.pop("token_ids", None),
        "routed_experts": None,
    }
    return {
        "id": str,
        "object": Is("chat.completion"),
        "created": int,
        "model": str,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": str,
        "usage": USAGE,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    } | changed


def completion_answer(**changed: Any) -> dict[str, Any]:
    choice = {
        "index": int,
        "text": str,
        "logprobs": changed.pop("logprobs", None),
        "finish_reason": FINISH,
        "stop_reason": Either(str, int, None),
        "token_ids": changed.pop("token_ids", None),
        "prompt_logprobs": changed.pop("prompt_logprobs", None),
        "prompt_token_ids": changed.pop("prompt_token_ids", None),
        "routed_experts": None,
    }
    return {
        "id": str,
        "object": Is("text_completion"),
        "created": int,
        "model": str,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": str,
        "usage": USAGE,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    } | changed


def error(status: int, kind: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": str, "type": Is(kind), "param": Is(param), "code": Is(status)}}


CHUNK = {"id": str, "created": int, "model": str}
CHAT_CHUNK = CHUNK | {"object": Is("chat.completion.chunk")}
COMPLETION_CHUNK = CHUNK | {"object": Is("text_completion")}
FINGERPRINT = {"system_fingerprint": str}
KV_ERROR = error(500, "InternalServerError")


def role_chunk(ids: Any = None) -> dict[str, Any]:
    delta = {"role": Is("assistant"), "content": Is("")}
    choice = {"index": int, "delta": delta, "logprobs": None, "finish_reason": None}
    return CHAT_CHUNK | {"choices": [choice], "prompt_token_ids": ids, "prompt_text": None}


def chat_chunk(*, last: bool = False, logprobs: Any = None, ids: Any = None) -> dict[str, Any]:
    choice = {"index": int, "delta": {"content": str}, "logprobs": logprobs, "token_ids": ids}
    choice |= (
        {"finish_reason": FINISH, "stop_reason": Either(str, int, None)} if last else {"finish_reason": None}
    )
    return CHAT_CHUNK | {"choices": [choice]}


def completion_chunk(
    *, last: bool = False, logprobs: Any = None, ids: Any = None, prompt_ids: Any = None
) -> dict[str, Any]:
    choice = {
        "index": int,
        "text": str,
        "logprobs": logprobs,
        "finish_reason": FINISH if last else None,
        "stop_reason": Either(str, int, None),
        "prompt_token_ids": prompt_ids,
        "token_ids": ids,
    }
    return COMPLETION_CHUNK | {"choices": [choice]}


def usage_chunk(chunk: dict[str, Any], **details: Any) -> dict[str, Any]:
    usage = PLAIN_USAGE | {"prompt_tokens_details": {"cached_tokens": int} | details}
    return chunk | FINGERPRINT | {"choices": Is([]), "usage": usage}


def said(answer: httpx.Response) -> str:
    """All of the first choice, streamed or not."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        choices = [choice for event in events(answer) for choice in event["choices"]]
    else:
        choices = answer.json()["choices"]
    return "".join(_text(choice) for choice in choices if choice["index"] == 0)


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return (choice.get("message") or choice["delta"]).get("content") or ""


def unique(words: int = 20) -> str:
    """A prompt that no cache knows."""
    return f"{uuid.uuid4()} " + "what is prefill " * words


# --- whole answers


def test_a_chat(engine: Engine) -> None:
    answer = engine.ask(engine.chat())
    assert answer.headers["content-type"] == "application/json"
    assert_shape(answer.json(), chat_answer())
    assert answer.json()["model"] == engine.model


def test_a_chat_with_everything(engine: Engine) -> None:
    fields = {"n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    answer = engine.ask(engine.chat(**fields, prompt_logprobs=1)).json()
    shape = chat_answer(
        logprobs=CHAT_LOGPROBS, token_ids=[int], prompt_token_ids=[int], prompt_logprobs=PROMPT_LOGPROBS
    )
    assert_shape(answer, shape)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])


def test_a_completion(engine: Engine) -> None:
    assert_shape(engine.ask(engine.completion()).json(), completion_answer())


def test_a_completion_with_everything(engine: Engine) -> None:
    fields = {"n": 2, "temperature": 1, "logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True}
    answer = engine.ask(engine.completion(**fields)).json()
    shape = completion_answer(
        logprobs=COMPLETION_LOGPROBS, token_ids=[int], prompt_token_ids=[int], prompt_logprobs=PROMPT_LOGPROBS
    )
    assert_shape(answer, shape)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_several_prompts(engine: Engine) -> None:
    prompts = ["What is prefill?", "What is decode?"]
    answer = engine.ask(engine.completion(prompts)).json()
    assert_shape(answer, completion_answer())
    alone = [said(engine.ask(engine.completion(prompt))) for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == alone
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_token_ids_as_a_prompt(engine: Engine) -> None:
    document = engine.completion(return_token_ids=True)
    (choice,) = engine.ask(document).json()["choices"]
    again = engine.ask(document | {"prompt": choice["prompt_token_ids"]}).json()
    assert again["choices"] == [choice]
    several = engine.ask(document | {"prompt": [choice["prompt_token_ids"]]}).json()
    assert several["choices"] == [choice]


def test_echo(engine: Engine) -> None:
    document = engine.completion("What is prefill?")
    plain = said(engine.ask(document))
    assert said(engine.ask(document | {"echo": True})) == "What is prefill?" + plain
    only = engine.ask(document | {"echo": True, "max_tokens": 0, "logprobs": 1}).json()
    assert_shape(only, completion_answer(logprobs=COMPLETION_LOGPROBS, prompt_logprobs=PROMPT_LOGPROBS))
    assert only["choices"][0]["text"] == "What is prefill?"
    assert only["choices"][0]["logprobs"]["token_logprobs"][0] is None


def test_beam_search(engine: Engine) -> None:
    answer = engine.ask(engine.completion(use_beam_search=True, n=2)).json()
    usage = USAGE | {"prompt_tokens_details": None}
    assert_shape(answer, completion_answer(usage=usage))
    assert len(answer["choices"]) == 2


def test_usage_adds_up(engine: Engine) -> None:
    for document in (engine.chat(ignore_eos=True), engine.completion(ignore_eos=True)):
        usage = engine.ask(document).json()["usage"]
        assert usage["completion_tokens"] == 4
        assert usage["total_tokens"] == usage["prompt_tokens"] + 4


def test_a_stop_string(engine: Engine) -> None:
    for make in (engine.chat, engine.completion):
        word = said(engine.ask(make(max_tokens=8, ignore_eos=True))).split()[0]
        (choice,) = engine.ask(make(max_tokens=8, ignore_eos=True, stop=[word])).json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)
        assert _text(choice).strip() == ""


def test_a_stop_token(engine: Engine) -> None:
    document = engine.completion(return_token_ids=True, ignore_eos=True)
    first = engine.ask(document).json()["choices"][0]["token_ids"][0]
    (choice,) = engine.ask(document | {"stop_token_ids": [first]}).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", first)
    assert (choice["text"], choice["token_ids"]) == ("", [first])


def test_our_id_is_the_answers_id(engine: Engine) -> None:
    for document, prefix in ((engine.chat(), "chatcmpl"), (engine.completion(), "cmpl")):
        answer = engine.ask(document, **{"X-Request-Id": "ours-1"}).json()
        assert answer["id"] == f"{prefix}-ours-1"


# --- streams


def test_a_chat_stream(engine: Engine) -> None:
    answer = engine.ask(engine.chat(stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    role, *tokens, last = events(answer)
    assert_shape(role, role_chunk())
    assert tokens
    assert_shape(tokens, [chat_chunk()])
    assert_shape(last, chat_chunk(last=True) | FINGERPRINT)
    assert said(answer) == said(engine.ask(engine.chat()))


def test_a_chat_stream_with_everything(engine: Engine) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    answer = engine.ask(engine.chat(stream=True, stream_options={"include_usage": True}, **fields))
    role, *tokens, last, usage = events(answer)
    assert_shape(role, role_chunk([int]))
    assert_shape(tokens, [chat_chunk(logprobs=CHAT_LOGPROBS, ids=[int])])
    assert_shape(last, chat_chunk(last=True, logprobs=CHAT_LOGPROBS, ids=[int]))
    assert_shape(usage, usage_chunk(CHAT_CHUNK, created_cache_tokens=int))


def test_a_chat_stream_of_several(engine: Engine) -> None:
    one, other, *tokens = events(engine.ask(engine.chat(stream=True, n=2, temperature=1)))
    assert_shape([one, other], [role_chunk()])
    assert [event["choices"][0]["index"] for event in (one, other)] == [0, 1]
    assert_shape(tokens, [Either(chat_chunk(), chat_chunk(last=True) | FINGERPRINT)])
    ends = [event["choices"][0] for event in tokens if event["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1]


def test_usage_all_along(engine: Engine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    role, *tokens, usage = events(engine.ask(engine.chat(stream=True, stream_options=options)))
    along = PLAIN_USAGE | {"completion_tokens_details": None}
    assert_shape(role, role_chunk() | {"usage": along})
    shapes = chat_chunk() | {"usage": along}, chat_chunk(last=True) | {"usage": along}
    assert_shape(tokens, [Either(*shapes)])
    assert_shape(usage, usage_chunk(CHAT_CHUNK, created_cache_tokens=int))


def test_a_completion_stream(engine: Engine) -> None:
    answer = engine.ask(engine.completion(stream=True))
    *tokens, last = events(answer)
    assert tokens
    assert_shape(tokens, [completion_chunk()])
    assert_shape(last, completion_chunk(last=True) | FINGERPRINT)
    assert said(answer) == said(engine.ask(engine.completion()))


def test_a_completion_stream_with_everything(engine: Engine) -> None:
    fields = {"logprobs": 1, "return_token_ids": True, "stream_options": {"include_usage": True}}
    first, *tokens, last, usage = events(engine.ask(engine.completion(stream=True, **fields)))
    shape = {"logprobs": COMPLETION_LOGPROBS, "ids": [int]}
    assert_shape(first, completion_chunk(**shape, prompt_ids=[int]))
    assert_shape(tokens, [completion_chunk(**shape)])
    assert_shape(last, completion_chunk(**shape, last=True))
    assert_shape(usage, usage_chunk(COMPLETION_CHUNK))


# --- the hand-off


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_the_prefill_answer(engine: Engine, form: str) -> None:
    document = getattr(engine, form)(unique(), return_token_ids=True)
    answer = engine.prefill(document)
    shapes = {"chat": chat_answer, "completion": completion_answer}
    fields = {"kv_transfer_params": HANDOFF, "token_ids": [int], "prompt_token_ids": [int]}
    assert_shape(answer, shapes[form](**fields))
    params = answer["kv_transfer_params"]
    assert params["remote_num_tokens"] == answer["usage"]["prompt_tokens"]
    assert params["remote_request_id"].startswith(answer["id"])
    assert engine.kv_usage() > 0
    assert engine.decode(document, params).status_code == 200
    wait_for(lambda: engine.kv_usage() == 0, "the blocks to be freed", LIMIT_S)


@pytest.mark.parametrize("form", ["chat", "completion"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_handoff(engine: Engine, form: str, stream: bool) -> None:
    document = getattr(engine, form)(unique(), max_tokens=12)
    answer = engine.decode(document, engine.handoff(document), stream=stream)
    assert said(answer) == said(engine.ask(document))
    if not stream:
        assert answer.json()["kv_transfer_params"] is None


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_the_evidence_of_a_transfer(engine: Engine, form: str) -> None:
    document = getattr(engine, form)(unique())
    usage = engine.decode(document, engine.handoff(document)).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = events(engine.decode(document, engine.handoff(document), **options))[-1]["usage"]
    assert streamed["prompt_tokens_details"]["cached_tokens"] == streamed["prompt_tokens"]


def test_a_forwarded_count_is_repeated(engine: Engine) -> None:
    document = engine.chat(unique())
    handoff = engine.handoff(document) | {"remote_prefill_cached_tokens": 3}
    usage = engine.decode(document, handoff).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3


def test_several_answers_from_one_handoff(engine: Engine) -> None:
    document = engine.chat(unique(), temperature=1, n=1)
    answer = engine.decode(document, engine.handoff(document), n=2)
    assert_shape(answer.json(), chat_answer())
    assert len(answer.json()["choices"]) == 2


def test_token_ids_with_the_handoff(engine: Engine) -> None:
    document = engine.chat(unique(), max_tokens=8)
    ids = engine.prefill(document | {"return_token_ids": True})
    params = ids["kv_transfer_params"] | {"prompt_token_ids": ids["prompt_token_ids"]}
    del params["remote_prefill_cached_tokens"]
    answer = engine.decode(engine.chat("x", max_tokens=8), params)
    assert said(answer) == said(engine.ask(document))
    assert answer.json()["usage"]["prompt_tokens"] == len(ids["prompt_token_ids"])


WRONG_HANDOFFS: dict[str, dict[str, Any]] = {
    "another engine": {"remote_engine_id": "00000000-0000-0000-0000-000000000000"},
    "nobody there": {"remote_engine_id": "11111111-0000-0000-0000-000000000000", "remote_port": 1},
}


@pytest.fixture(params=list(WRONG_HANDOFFS))
def wrong_handoff(engine: Engine, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Made of one that was used up: whatever becomes of it, nothing stays pinned."""
    document = engine.chat(unique())
    handoff = engine.handoff(document)
    assert engine.decode(document, handoff).status_code == 200
    return handoff | WRONG_HANDOFFS[request.param]


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_failed_handoff(engine: Engine, form: str, wrong_handoff: dict[str, Any]) -> None:
    answer = engine.decode(getattr(engine, form)(unique()), wrong_handoff)
    assert answer.status_code == 500
    assert_shape(answer.json(), KV_ERROR)


def test_a_failed_handoff_in_a_completion_stream(engine: Engine, wrong_handoff: dict[str, Any]) -> None:
    answer = engine.decode(engine.completion(unique()), wrong_handoff, stream=True)
    assert_shape(events(answer), [KV_ERROR])


@pytest.mark.parametrize("choices", [1, 2])
def test_a_failed_handoff_in_a_chat_stream(
    engine: Engine, wrong_handoff: dict[str, Any], choices: int
) -> None:
    """The role chunks come first, then the error."""
    document = engine.chat(unique(), temperature=1)
    *roles, last = events(engine.decode(document, wrong_handoff, stream=True, n=choices))
    assert len(roles) == choices
    assert_shape(roles, [role_chunk()])
    assert_shape(last, KV_ERROR)


def test_a_refused_decode_leg_frees(engine: Engine) -> None:
    document = engine.chat(unique())
    answer = engine.decode(document, engine.handoff(document), max_tokens=0)
    assert answer.status_code == 400
    wait_for(lambda: engine.kv_usage() == 0, "the blocks to be freed", LIMIT_S)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_decode_leg_frees(engine: Engine, stream: bool) -> None:
    document = engine.chat(unique())
    leg = document | {"kv_transfer_params": engine.handoff(document), "stream": stream}
    _send(engine.decode_url, CHAT, json.dumps(leg).encode()).close()
    wait_for(lambda: engine.kv_usage() == 0, "the blocks to be freed", LIMIT_S)


def test_nothing_expired(engine: Engine) -> None:
    assert metric(engine.prefill_url, "vllm:nixl_num_kv_expired_reqs_total") == 0


def test_the_prefix_cache_counts_whole_blocks(engine: Engine) -> None:
    document = engine.chat(unique(150))
    first, again = (engine.ask(document).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    created = first["prompt_tokens_details"]["created_cache_tokens"]
    assert 0 < created < first["prompt_tokens"]
    assert again["prompt_tokens_details"] == {
        "cached_tokens": created,
        "created_cache_tokens": 0,
        "multimodal_tokens": None,
    }


# --- errors

BAD_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10_000_000}, "max_tokens"),
    ({"min_tokens": 10}, None),
    ({"n": 0}, None),
    ({"n": 2}, None),
    ({"temperature": -1}, "temperature"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
]
WRONG_TYPES: list[dict[str, Any]] = [
    {"max_tokens": "many"},
    {"stream": "maybe"},
    {"stop": 5},
    {"n": []},
    {"kv_transfer_params": 1},
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_bad_field(engine: Engine, form: str, fields: dict[str, Any], param: str | None) -> None:
    answer = engine.ask(getattr(engine, form)(**fields))
    assert answer.status_code == 400
    assert_shape(answer.json(), error(400, param=param))


@pytest.mark.parametrize("fields", WRONG_TYPES)
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_field_of_the_wrong_type(engine: Engine, form: str, fields: dict[str, Any]) -> None:
    answer = engine.ask(getattr(engine, form)(**fields))
    assert answer.status_code == 400
    assert_shape(answer.json(), error(400, "Bad Request", f"body.{next(iter(fields))}"))


@pytest.mark.parametrize("prompt", ["", None])
def test_an_empty_prompt(engine: Engine, prompt: str | None) -> None:
    answer = engine.ask(engine.completion(prompt))
    assert_shape(answer.json(), error(400, param="prompt"))


def test_no_messages(engine: Engine) -> None:
    assert_shape(engine.ask(engine.chat(messages=[])).json(), error(400))
    missing = httpx.post(engine.decode_url + CHAT, json={"model": engine.model})
    assert_shape(missing.json(), error(400, "Bad Request", "body.messages"))


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_prompt_that_is_too_long(engine: Engine, form: str) -> None:
    answer = engine.ask(getattr(engine, form)("what is prefill " * 20_000))
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "BadRequestError"
    assert "maximum context length" in answer.json()["error"]["message"]


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_an_unknown_model(engine: Engine, form: str) -> None:
    answer = engine.ask(getattr(engine, form)(model="nobody"))
    assert answer.status_code == 404
    assert_shape(answer.json(), error(404, "NotFoundError", "model"))
    assert engine.model in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{bad", b"", b"[1]"])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_body_that_is_no_document(engine: Engine, path: str, body: bytes) -> None:
    answer = httpx.post(engine.decode_url + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert_shape(
        answer.json(), {"error": {"message": str, "type": Is("Bad Request"), "param": str, "code": int}}
    )


def test_another_content_type(engine: Engine) -> None:
    content = json.dumps(engine.chat())
    answer = httpx.post(engine.decode_url + CHAT, content=content, headers={"content-type": "text/plain"})
    assert_shape(answer.json(), error(400, "Bad Request"))


def test_unknown_paths_and_methods(engine: Engine) -> None:
    assert httpx.get(f"{engine.decode_url}/v1/nowhere").json() == {"detail": "Not Found"}
    answer = httpx.get(engine.decode_url + CHAT)
    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})


# --- the other endpoints


def test_tokenize(engine: Engine) -> None:
    url = engine.decode_url
    answer = httpx.post(f"{url}/tokenize", json={"model": engine.model, "prompt": "What is prefill?"}).json()
    assert_shape(answer, {"count": int, "max_model_len": int, "tokens": [int], "token_strs": None})
    assert answer["count"] == len(answer["tokens"])
    back = httpx.post(f"{url}/detokenize", json={"model": engine.model, "tokens": answer["tokens"]}).json()
    assert back == {"prompt": "What is prefill?"}


def test_tokenize_a_chat(engine: Engine) -> None:
    document = engine.chat(return_token_ids=True)
    asked = {"messages": document["messages"], "return_token_strs": True}
    answer = httpx.post(f"{engine.decode_url}/tokenize", json=asked).json()
    assert_shape(answer, {"count": int, "max_model_len": int, "tokens": [int], "token_strs": [str]})
    assert engine.ask(document).json()["prompt_token_ids"] == answer["tokens"]


def test_tokenize_errors(engine: Engine) -> None:
    url = engine.decode_url
    unknown = httpx.post(f"{url}/tokenize", json={"model": "nobody", "prompt": "x"})
    assert_shape(unknown.json(), error(404, "NotFoundError", "model"))
    nothing = httpx.post(f"{url}/tokenize", json={})
    assert_shape(nothing.json(), error(400, "Bad Request", "body.prompt"))
    wrong = httpx.post(f"{url}/detokenize", json={"tokens": "x"})
    assert_shape(wrong.json(), error(400, "Bad Request", "body.tokens"))


def test_models(engine: Engine) -> None:
    permission = Each(Either(str, int, bool, None))
    card = {
        "id": Is(engine.model),
        "object": Is("model"),
        "created": int,
        "owned_by": str,
        "root": str,
        "parent": None,
        "max_model_len": int,
        "permission": [permission],
    }
    for url in (engine.prefill_url, engine.decode_url):
        assert_shape(httpx.get(f"{url}/v1/models").json(), {"object": Is("list"), "data": [card]})


def test_health(engine: Engine) -> None:
    for path in ("/health", "/ping"):
        answer = httpx.get(engine.decode_url + path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert_shape(httpx.get(f"{engine.decode_url}/version").json(), {"version": str})


METRICS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:external_prefix_cache_queries_total": "counter",
    "vllm:external_prefix_cache_hits_total": "counter",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:nixl_xfer_time_seconds": "histogram",
    "vllm:nixl_num_failed_transfers_total": "counter",
    "vllm:nixl_num_failed_notifications_total": "counter",
    "vllm:nixl_num_kv_expired_reqs_total": "counter",
    "vllm:nixl_num_notifications_after_expiry_total": "counter",
}


def test_metrics(engine: Engine) -> None:
    for url in (engine.prefill_url, engine.decode_url):
        answer = httpx.get(f"{url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.text.splitlines()
        kinds = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE vllm:"))
        assert {name: kinds.get(name) for name in METRICS} == METRICS
        (running,) = [line for line in lines if line.startswith("vllm:num_requests_running{")]
        assert f'model_name="{engine.model}"' in running
        assert 'engine="0"' in running


def test_metrics_count(engine: Engine) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")

    def counted() -> list[float]:
        return [metric(engine.decode_url, f"vllm:{name}") for name in names]

    before = counted()
    usage = engine.ask(engine.chat(unique(), ignore_eos=True)).json()["usage"]
    expected = [before[0] + usage["prompt_tokens"], before[1] + 4, before[2] + 1]
    wait_for(lambda: counted() == expected, f"{expected}", LIMIT_S)


def _send(url: str, path: str, body: bytes) -> socket.socket:
    """A request of which nobody will read the answer."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname, place.port), timeout=LIMIT_S)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection
