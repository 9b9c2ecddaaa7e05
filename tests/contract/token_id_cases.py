"""The contract of tokenising once: ids from a prefill to a decode worker, simulated or real.

Whoever imports this has the fixtures `legs`, and `taker` whose decode worker takes every form.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

from tests.contract.cases import error, said, unique
from tests.contract.engines import ASK_PINNED, CHAT, COMPLETION, LIMIT_S, Engine, post
from tests.contract.shapes import assert_shape
from worker.token_ids import pack

FORMS = ["chat", "completion"]
PARAM = "kv_transfer_params.prompt_token_ids"
MSGPACK = {"content-type": "application/json", "x-msgpack": "1"}

BAD_PACKED = {
    "nothing": b"",
    "three bytes": b"abc",
    "five bytes": b"abcde",
    "a negative id": pack([1, -1]),
    "beyond any vocabulary": pack([2**31 - 1]),
    "more than fit": pack([5] * 4097),
}
BAD_BASE64 = {name: base64.b64encode(packed).decode() for name, packed in BAD_PACKED.items()} | {
    "no base64": "****",
    "cut": "AQAAAA=",
    "huge": "A" * 1_000_000,
}


@dataclass(frozen=True)
class Legs:
    """Both legs as an orchestrator sends them.

    The prefill worker is asked for the ids in the form `gives`; the decode worker gets what `passed` makes of
    them. Its context is 4096 tokens.
    """

    engine: Engine
    gives: str
    passed: Callable[[Any], Any] = lambda ids: ids

    def prefill(self, document: dict[str, Any]) -> httpx.Response:
        fields = {"max_tokens": 1, "ignore_eos": True, "return_token_ids": True}
        leg = document | fields | {"kv_transfer_params": ASK_PINNED}
        answer = post(self.engine.prefill_url, leg, **{"X-Token-Ids": self.gives})
        assert answer.status_code == 200, answer.text
        return answer

    def decode(self, document: dict[str, Any], prefilled: dict[str, Any], **fields: Any) -> httpx.Response:
        """A completion takes a list as its prompt; all else goes with the hand-off."""
        handoff, ids = dict(prefilled["kv_transfer_params"]), self.passed(ids_in(prefilled))
        del handoff["remote_prefill_cached_tokens"]
        if isinstance(ids, list) and "prompt" in document:
            return self.engine.decode(document | {"prompt": ids}, handoff, **fields)
        return self.send(document | fields, ids, handoff)

    def send(
        self, document: dict[str, Any], ids: Any, handoff: dict[str, Any] | None = None
    ) -> httpx.Response:
        """To the decode worker, as msgpack if JSON has no word for it."""
        document = document | {"kv_transfer_params": (handoff or {}) | {"prompt_token_ids": ids}}
        if not isinstance(ids, bytes):
            return self.engine.ask(document)
        url = self.engine.decode_url + (CHAT if "messages" in document else COMPLETION)
        return httpx.post(url, content=msgspec.msgpack.encode(document), headers=MSGPACK, timeout=LIMIT_S)


def read(answer: httpx.Response) -> dict[str, Any]:
    is_msgpack = answer.headers["content-type"] == "application/msgpack"
    return dict(msgspec.msgpack.decode(answer.content) if is_msgpack else answer.json())


def ids_in(prefilled: dict[str, Any]) -> Any:
    """Packed ids are at the top level, lists where vLLM has them."""
    return prefilled.get("prompt_token_ids") or prefilled["choices"][0]["prompt_token_ids"]


def listed(ids: Any) -> list[int]:
    packed = base64.b64decode(ids) if isinstance(ids, str) else ids
    return packed if isinstance(packed, list) else list(memoryview(packed).cast("i"))


def cut(document: dict[str, Any]) -> dict[str, Any]:
    """Without the text that has been tokenised."""
    short = {"messages": [{"role": "user", "content": "x"}]} if "messages" in document else {"prompt": "x"}
    return document | short


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_text_is_the_same_without_the_prompt(legs: Legs, form: str, stream: bool) -> None:
    document = getattr(legs.engine, form)(max_tokens=30)
    expected = said(legs.engine.ask(document))
    answer = legs.decode(cut(document), read(legs.prefill(document)), stream=stream)
    assert said(answer) == expected != ""


@pytest.mark.parametrize("form", FORMS)
def test_usage_counts_the_ids(legs: Legs, form: str) -> None:
    document = getattr(legs.engine, form)(unique())
    prefilled = read(legs.prefill(document))
    usage = legs.decode(cut(document), prefilled).json()["usage"]
    assert usage["prompt_tokens"] == prefilled["usage"]["prompt_tokens"] == len(listed(ids_in(prefilled)))
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_where_the_ids_are(legs: Legs, form: str) -> None:
    document = getattr(legs.engine, form)(unique())
    answer = legs.prefill(document)
    prefilled = read(answer)
    (choice,) = prefilled["choices"]
    is_binary, is_packed = legs.gives == "bin", legs.gives != "list"
    assert answer.headers["content-type"] == f"application/{'msgpack' if is_binary else 'json'}"
    assert ("prompt_token_ids" in prefilled) == (is_packed or form == "chat")
    assert (choice["token_ids"] is None) == is_packed
    assert bool(choice.get("prompt_token_ids")) == (not is_packed and form == "completion")
    assert type(ids_in(prefilled)) is {"list": list, "base64": str, "bin": bytes}[legs.gives]
    assert legs.decode(cut(document), prefilled).status_code == 200


@pytest.mark.parametrize("form", FORMS)
def test_a_prefill_leg_that_is_refused(legs: Legs, form: str) -> None:
    document = getattr(legs.engine, form)(return_token_ids=True) | {"model": "unknown"}
    answer = post(legs.engine.prefill_url, document, **{"X-Token-Ids": legs.gives})
    assert answer.status_code == 404
    assert_shape(answer.json(), error(404, "NotFoundError", "model"))


@pytest.mark.parametrize("ids", [[], [1, -1], [1, True], [1, "2"], [2**31 - 1], {}, 7])
def test_bad_lists(legs: Legs, ids: Any) -> None:
    assert_refused(legs.send(legs.engine.chat(), ids), "BadRequestError")


def test_a_list_that_does_not_fit(legs: Legs) -> None:
    answer = legs.send(legs.engine.chat(), [5] * 4097)
    assert answer.status_code == 400
    assert_shape(answer.json(), error(400))


def test_what_is_echoed_is_tokenised(legs: Legs) -> None:
    document = legs.engine.chat(echo=True)
    expected = legs.engine.ask(document)
    answer = legs.send(document, [5])
    assert said(answer) == said(expected)
    assert answer.json()["usage"]["prompt_tokens"] == expected.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_bytes(taker: Legs, form: str, name: str) -> None:
    assert_refused(taker.send(getattr(taker.engine, form)(), BAD_PACKED[name]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_BASE64)
def test_bad_base64(taker: Legs, form: str, name: str) -> None:
    assert_refused(taker.send(getattr(taker.engine, form)(), BAD_BASE64[name]))


def assert_refused(answer: httpx.Response, kind: str = "Bad Request") -> None:
    """Packed ids are refused before vLLM's serving layer: the blocks of the hand-off stay as they are."""
    assert answer.status_code == 400, answer.text
    assert_shape(answer.json(), error(400, kind, PARAM))
