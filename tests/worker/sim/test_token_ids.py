"""Token ids from a prefill to a decode worker, in every form that the workers announce."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec
import pytest

from tests.worker.sim.asking import ASK_PINNED, ask, cached_tokens, chat, completion, path_of, text_of
from tests.worker.sim.workers import Worker, running
from tests.worker.test_token_ids import BAD_BASE64, BAD_PACKED, LIMITS
from worker.sim import text
from worker.token_ids import pack

Pairs = Mapping[str, tuple[Worker, Worker]]  # by transport: prefill and decode

MAKES = [chat, completion]
LONG = "Tokenise once " * 30
FORMS = [
    ("json", "list"),
    ("orjson", "list"),
    ("orjson", "base64"),
    ("msgpack", "base64"),
    ("msgpack", "bin"),
]
MSGPACK = {"content-type": "application/json", "x-msgpack": "1"}


@pytest.fixture(scope="module")
def pairs() -> Iterator[Pairs]:
    with (
        running(role="prefill") as p1,
        running(role="decode") as d1,
        running(role="prefill", transport="orjson") as p2,
        running(role="decode", transport="orjson") as d2,
        running(role="prefill", transport="msgpack") as p3,
        running(role="decode", transport="msgpack") as d3,
    ):
        yield {"json": (p1, d1), "orjson": (p2, d2), "msgpack": (p3, d3)}


@pytest.fixture(params=FORMS, ids="-".join)
def legs(request: pytest.FixtureRequest, pairs: Pairs) -> Legs:
    transport, form = request.param
    return Legs(*pairs[transport], form)


@pytest.fixture
def worker(pairs: Pairs) -> Worker:
    return pairs["msgpack"][1]


class Legs:
    """Both legs as the orchestrator sends them, with ids in one form."""

    def __init__(self, prefiller: Worker, decoder: Worker, form: str) -> None:
        self.prefiller, self.decoder, self.form = prefiller, decoder, form

    def prefill(self, document: dict[str, Any]) -> httpx.Response:
        fields = {"max_tokens": 1, "ignore_eos": True, "return_token_ids": True}
        leg = document | fields | {"kv_transfer_params": ASK_PINNED}
        return ask(self.prefiller, leg, **{"X-Token-Ids": self.form})

    def decode(self, document: dict[str, Any], answer: dict[str, Any], **fields: Any) -> httpx.Response:
        """A completion takes a list as its prompt, as vLLM does; all else goes with the hand-off."""
        handoff, ids = dict(answer["kv_transfer_params"]), ids_in(answer)
        del handoff["remote_prefill_cached_tokens"]
        if isinstance(ids, list) and "prompt" in document:
            document = document | {"prompt": ids}
        else:
            handoff["prompt_token_ids"] = ids
        return send(self.decoder, document | {"kv_transfer_params": handoff} | fields)


def send(worker: Worker, document: dict[str, Any]) -> httpx.Response:
    """As msgpack if JSON has no word for it."""
    if not isinstance(document["kv_transfer_params"].get("prompt_token_ids"), bytes):
        return ask(worker, document)
    content = msgspec.msgpack.encode(document)
    return worker.client.post(path_of(document), content=content, headers=MSGPACK)


def read(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    is_msgpack = answer.headers["content-type"] == "application/msgpack"
    return dict(msgspec.msgpack.decode(answer.content) if is_msgpack else answer.json())


def ids_in(answer: dict[str, Any]) -> Any:
    """Packed ids are at the top level, lists where vLLM has them."""
    return answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")


def cut(document: dict[str, Any]) -> dict[str, Any]:
    """Without the text that has been tokenized."""
    short = {"messages": [{"role": "user", "content": "x"}]} if "messages" in document else {"prompt": "x"}
    return document | short


# --- two legs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_text_is_the_same_without_the_prompt(legs: Legs, make: Any, stream: bool) -> None:
    document = make(LONG, max_tokens=30)
    expected = text_of(ask(legs.decoder, document))
    tokenized = legs.decoder.metric("sim:tokenized_prompts_total")
    answer = legs.decode(cut(document), read(legs.prefill(document)), stream=stream)
    assert text_of(answer) == expected != ""
    assert legs.decoder.metric("sim:tokenized_prompts_total") == tokenized


@pytest.mark.parametrize("make", MAKES)
def test_usage_counts_the_ids(legs: Legs, make: Any) -> None:
    prefilled = read(legs.prefill(make(LONG)))
    answer = legs.decode(cut(make()), prefilled)
    counted = answer.json()["usage"]["prompt_tokens"]
    assert counted == prefilled["usage"]["prompt_tokens"] == cached_tokens(answer) > 100


@pytest.mark.parametrize("make", MAKES)
def test_the_form_of_the_answer(legs: Legs, make: Any) -> None:
    document = make(LONG)
    answer = legs.prefill(document)
    prefilled = read(answer)
    expected = read(ask(legs.decoder, document | {"return_token_ids": True}))
    listed = ids_in(expected)
    ids = ids_in(prefilled)
    assert answer.headers["content-type"] == (
        "application/msgpack" if legs.form == "bin" else "application/json"
    )
    if legs.form == "list":
        assert ids == listed
        assert prefilled.keys() == expected.keys()
        assert prefilled["choices"][0]["token_ids"]
    else:
        assert prefilled["prompt_token_ids"] == ids
        assert (base64.b64decode(ids) if legs.form == "base64" else ids) == pack(listed)
        assert prefilled.keys() == expected.keys() | {"prompt_token_ids"}
        assert prefilled["choices"][0]["token_ids"] is None
        assert prefilled["choices"][0].get("prompt_token_ids") is None
    legs.decode(document, prefilled)


def test_nobody_asked_for_ids(pairs: Pairs) -> None:
    answer = ask(pairs["msgpack"][0], chat(), **{"X-Token-Ids": "bin"})
    assert (answer.headers["content-type"], answer.json()["prompt_token_ids"]) == ("application/json", None)


@pytest.mark.parametrize(
    ("transport", "form"), [("json", "bin"), ("json", "base64"), ("orjson", "bin"), ("msgpack", "x")]
)
def test_a_form_that_was_not_announced_is_a_list(pairs: Pairs, transport: str, form: str) -> None:
    answer = ask(pairs[transport][0], chat(return_token_ids=True), **{"X-Token-Ids": form})
    assert isinstance(answer.json()["prompt_token_ids"], list)


@pytest.mark.parametrize("make", MAKES)
def test_a_refusal_is_json(worker: Worker, make: Any) -> None:
    document = make(return_token_ids=True, model="unknown")
    answer = ask(worker, document, **{"X-Token-Ids": "bin"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize("make", MAKES)
def test_a_stream_gives_lists(worker: Worker, make: Any) -> None:
    answer = ask(worker, make(return_token_ids=True, stream=True), **{"X-Token-Ids": "bin"})
    assert b'"prompt_token_ids":[' in answer.content


def test_text_is_tokenized_and_counted(worker: Worker) -> None:
    before = worker.metric("sim:tokenized_prompts_total")
    for document in (chat(), completion(), completion(["one", "two"]), completion([30, 31])):
        assert ask(worker, document).status_code == 200
    assert worker.metric("sim:tokenized_prompts_total") == before + 4


# --- bad ids --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[Worker]:
    """Its limits are those of the bad ids, but for a vocabulary that is far larger."""
    with running(transport="msgpack", block_size=1, max_model_len=LIMITS.max_tokens) as worker:
        yield worker


def assert_refused(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["param"] == "kv_transfer_params.prompt_token_ids"
    return str(error["message"])


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", [name for name in BAD_PACKED if "beyond" not in name])
def test_bad_bytes(small: Worker, make: Any, name: str) -> None:
    packed, why = BAD_PACKED[name]
    answer = send(small, make(kv_transfer_params={"prompt_token_ids": packed}))
    assert why in assert_refused(answer)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", [name for name in BAD_BASE64 if "beyond" not in name])
def test_bad_base64(small: Worker, make: Any, name: str) -> None:
    given, why = BAD_BASE64[name]
    assert why in assert_refused(ask(small, make(kv_transfer_params={"prompt_token_ids": given})))


@pytest.mark.parametrize("make", MAKES)
def test_ids_beyond_the_vocabulary(worker: Worker, make: Any) -> None:
    packed = pack([5, text.VOCAB_SIZE])
    answer = send(worker, make(kv_transfer_params={"prompt_token_ids": packed}))
    assert "out of vocabulary" in assert_refused(answer)


@pytest.mark.parametrize("ids", [[], [1, -1], [1, True], [1, "2"], [text.VOCAB_SIZE], {}, 7])
def test_bad_lists(worker: Worker, ids: Any) -> None:
    assert_refused(ask(worker, chat(kv_transfer_params={"prompt_token_ids": ids})))


def test_a_list_that_is_too_long(small: Worker) -> None:
    answer = ask(small, chat(kv_transfer_params={"prompt_token_ids": [5] * 9}))
    assert answer.status_code == 400
    assert "exceeds model's maximum context length (8)" in answer.json()["error"]["message"]


def test_bytes_anywhere_else_are_refused(worker: Worker) -> None:
    for fields in (
        {"user": b"abcd"},
        {"kv_transfer_params": {"other": b"abcd", "prompt_token_ids": b"abcd"}},
    ):
        content = msgspec.msgpack.encode(chat(**fields))
        answer = worker.client.post("/v1/chat/completions", content=content, headers=MSGPACK)
        assert answer.status_code == 400


def test_a_worker_with_json_takes_no_packed_ids(pairs: Pairs) -> None:
    given = base64.b64encode(pack([30, 31])).decode()
    assert_refused(ask(pairs["json"][1], chat(kv_transfer_params={"prompt_token_ids": given})))


# --- where the messages count ---------------------------------------------------------------------------


def test_what_is_echoed_or_no_text_is_tokenized(worker: Worker) -> None:
    image = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    said = [{"role": "user", "content": "Hi"}]
    for fields in ({"echo": True, "messages": said}, {"messages": [{"role": "user", "content": image}]}):
        document = chat(max_tokens=4) | fields
        expected = text_of(ask(worker, document))
        assert text_of(ask(worker, document | {"kv_transfer_params": {"prompt_token_ids": [30]}})) == expected
