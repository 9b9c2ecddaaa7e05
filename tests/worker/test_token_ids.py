from __future__ import annotations

import asyncio
import base64
import struct
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.token_ids import (
    WANTED_KEY,
    BadTokenIds,
    Limits,
    RequestedIds,
    encode_answer,
    pack,
    packing,
    unpack,
    unpack_in,
)

LIMITS = Limits(vocab_size=1000, max_tokens=8)
PROMPTS = st.lists(st.integers(0, 999), min_size=1, max_size=8)
BAD_PACKED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "three bytes": (b"abc", "3 bytes"),
    "five bytes": (b"abcde", "5 bytes"),
    "a negative id": (pack([1, -1]), "id -1 is out of vocabulary"),
    "one beyond the vocabulary": (pack([1000]), "id 1000 is out of vocabulary"),
    "more than fit": (pack([1] * 9), "9 ids; the model's context is 8 tokens"),
}
BAD_BASE64: dict[str, tuple[str, str]] = {
    "no alphabet of base64": ("****", "not base64"),
    "of the alphabet for URLs": ("-_-_-_-_", "not base64"),
    "cut": ("AQAAAA=", "not base64"),
    "with a space": (" AQAAAA==", "not base64"),
    "not ASCII": ("éééé", "not base64"),
    "no text": ("", "0 bytes"),
    "huge": ("A" * 1_000_000, "too long; the model's context is 8 tokens"),
    **{name: (base64.b64encode(packed).decode(), why) for name, (packed, why) in BAD_PACKED.items()},
}


# --- both ways ------------------------------------------------------------------------------------------


@given(PROMPTS)
def test_ids_come_back_from_every_form(ids: list[int]) -> None:
    packed = pack(ids)
    assert packed == struct.pack(f"<{len(ids)}i", *ids)
    for form in (packed, base64.b64encode(packed).decode()):
        back = unpack(form, LIMITS)
        assert back == ids
        assert {type(one) for one in back} == {int}


def test_the_largest_prompt_is_taken() -> None:
    large = Limits(vocab_size=2**31, max_tokens=50_000)
    ids = [2**31 - 1] * 50_000
    assert unpack(base64.b64encode(pack(ids)).decode(), large) == unpack(pack(ids), large) == ids


@pytest.mark.parametrize(("packed", "why"), [*BAD_PACKED.values(), *BAD_BASE64.values()])
def test_bad_ids_are_refused_by_name(packed: str | bytes, why: str) -> None:
    with pytest.raises(BadTokenIds, match=r"^kv_transfer_params\.prompt_token_ids.*") as caught:
        unpack(packed, LIMITS)
    assert why in str(caught.value)


# --- requests -------------------------------------------------------------------------------------------


def leg(ids: Any) -> dict[str, Any]:
    return {"prompt": "x", "kv_transfer_params": {"remote_port": 1, "prompt_token_ids": ids}}


def test_a_chat_keeps_its_ids_with_the_handoff() -> None:
    document = leg(pack([1, 2]))
    unpack_in(document, LIMITS, is_completion=False)
    assert document == leg([1, 2])


def test_a_completion_has_them_as_its_prompt() -> None:
    document = leg(base64.b64encode(pack([1, 2])).decode())
    unpack_in(document, LIMITS, is_completion=True)
    assert document == {"prompt": [1, 2], "kv_transfer_params": {"remote_port": 1}}


@pytest.mark.parametrize(
    "document",
    [
        leg([1, 2]),
        leg([]),
        leg(None),
        leg(5),
        {"prompt": "x"},
        {"kv_transfer_params": None},
        [1],
        "text",
        None,
    ],
)
@pytest.mark.parametrize("is_completion", [False, True])
def test_everything_else_is_left_alone(document: Any, is_completion: bool) -> None:
    before = msgspec.json.encode(document)
    unpack_in(document, LIMITS, is_completion=is_completion)
    assert msgspec.json.encode(document) == before


def test_a_refused_document_is_left_alone() -> None:
    document = leg(b"abc")
    with pytest.raises(BadTokenIds):
        unpack_in(document, LIMITS, is_completion=True)
    assert document == leg(b"abc")


# --- answers --------------------------------------------------------------------------------------------


def test_an_answer_in_json_and_in_msgpack() -> None:
    document, packed = {"id": "a", "prompt_token_ids": None}, pack([1, 2])
    body, content_type = encode_answer(document, "base64", packed)
    assert content_type == "application/json"
    assert base64.b64decode(msgspec.json.decode(body)["prompt_token_ids"]) == packed
    body, content_type = encode_answer(document, "bin", packed)
    assert content_type == "application/msgpack"
    assert msgspec.msgpack.decode(body) == {"id": "a", "prompt_token_ids": packed}


def ask(answer: Any, state: Any) -> Any:
    """What is made of an answer of vLLM's for a request with this state."""

    async def create(request: Any, raw_request: Any = None) -> Any:
        return answer

    return asyncio.run(packing(create)("request", SimpleNamespace(state=state)))


def chat_answer(ids: list[int] | None) -> Any:
    return SimpleNamespace(prompt_token_ids=ids, choices=[SimpleNamespace(index=0, token_ids=[7])])


def test_the_ids_are_taken_out_of_a_chat() -> None:
    wanted = RequestedIds("bin")
    answer = ask(chat_answer([1, 2]), SimpleNamespace(**{WANTED_KEY: wanted}))
    assert wanted.packed == pack([1, 2])
    assert (answer.prompt_token_ids, answer.choices[0].token_ids) == (None, None)


def test_the_ids_are_taken_out_of_a_completion() -> None:
    wanted = RequestedIds("base64")
    choice = SimpleNamespace(index=0, token_ids=[7], prompt_token_ids=[1, 2])
    ask(SimpleNamespace(choices=[choice]), SimpleNamespace(**{WANTED_KEY: wanted}))
    assert wanted.packed == pack([1, 2])
    assert (choice.prompt_token_ids, choice.token_ids) == (None, None)


@pytest.mark.parametrize("answer", ["a stream", SimpleNamespace(error="bad"), chat_answer(None)])
def test_other_answers_have_none(answer: Any) -> None:
    wanted = RequestedIds("bin")
    assert ask(answer, SimpleNamespace(**{WANTED_KEY: wanted})) is answer
    assert wanted.packed is None


def test_nobody_asked() -> None:
    answer = ask(chat_answer([1, 2]), SimpleNamespace())
    assert answer.prompt_token_ids == [1, 2]


def test_a_call_without_a_request() -> None:
    async def create(request: Any, raw_request: Any = None) -> Any:
        return chat_answer([1, 2])

    assert asyncio.run(packing(create)("request")).prompt_token_ids == [1, 2]
