from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.failover.tokenize import (
    Ids,
    ids_of,
    known_prompt_ids,
    known_sent_ids,
    tokenize_prompt,
    tokenize_text,
    tokenized,
)
from orchestrator.failover.transcript import CannotContinue
from orchestrator.legs.connectors.base import TokenIds
from tests.orchestrator.wire.cut_streams import sent_of, view_of
from worker.token_ids import pack

Json = dict[str, Any]

CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
COMPLETION: Json = {"model": "tiny", "prompt": "Once", "stream": True}

numbers = st.lists(st.integers(0, 2**31 - 1))


@given(numbers, numbers, st.sampled_from([(",", ":"), (" ,\n", ":"), (", ", ": ")]))
def test_lists_are_joined_as_they_are_written(first: list[int], second: list[int], how: Any) -> None:
    written = f'{{"tokens": {json.dumps(first, separators=how)} }}'.encode()
    ids = tokenized(written)[0].followed_by(ids_of(second))
    assert json.loads(ids.json) == first + second
    assert ids.count == len(first) + len(second)


@given(numbers.filter(bool))
def test_all_forms_of_a_prompts_ids_say_the_same(ids: list[int]) -> None:
    packed = pack(ids)
    forms = [
        TokenIds(json=json.dumps(ids).encode()),
        TokenIds(json=b'"%b"' % base64.b64encode(packed)),
        TokenIds(packed=packed),
    ]
    for form in forms:
        known = known_prompt_ids(view_of(CHAT), sent_of(), form)
        assert known is not None
        assert (json.loads(known.json), known.count) == (ids, len(ids))


@pytest.mark.parametrize("form", [TokenIds(json=b'"?"'), TokenIds(packed=b"abc"), TokenIds(json=b'"QUI="')])
def test_ids_that_cannot_be_read(form: TokenIds) -> None:
    with pytest.raises(CannotContinue, match="cannot be read"):
        known_prompt_ids(view_of(CHAT), sent_of(), form)


def test_what_the_client_was_told_comes_first() -> None:
    known = known_prompt_ids(view_of(CHAT), sent_of(prompt_ids=b"[1,2]"), TokenIds(json=b"[3]"))
    assert known == Ids(b"[1,2]", 2)
    assert known_sent_ids(sent_of(ids=[4, 5, 6])) == Ids(b"[4,5,6]", 3)


def test_a_prompt_of_ids_is_known() -> None:
    view = view_of(COMPLETION | {"prompt": [7, 8]})
    assert known_prompt_ids(view, sent_of(is_chat=False), None) == Ids(b"[7, 8]", 2)


def test_nobody_knows() -> None:
    assert known_prompt_ids(view_of(CHAT), sent_of(), None) is None
    assert known_prompt_ids(view_of(COMPLETION), sent_of(is_chat=False), None) is None
    assert known_sent_ids(sent_of()) is None


# --- what a worker is asked ---------------------------------------------------------------------


def asked(document: Json) -> Json:
    answer: Json = json.loads(
        tokenize_prompt(view_of(document), sent_of(is_chat="messages" in document), "own")
    )
    return answer


def test_a_chats_prompt_is_made_by_its_template() -> None:
    template = {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
        "chat_template": "x",
        "chat_template_kwargs": {"a": 1},
    }
    assert asked(CHAT | template | {"temperature": 1}) == {
        "model": "own",
        "messages": CHAT["messages"],
        **template,
    }


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        (
            {"documents": [{"a": "b"}], "reasoning_effort": None, "chat_template_kwargs": {"c": 1}},
            {"documents": [{"a": "b"}], "c": 1},
        ),
    ],
)
def test_fields_that_vllm_hands_to_the_template_go_there(fields: Json, arguments: Json) -> None:
    assert asked(CHAT | fields)["chat_template_kwargs"] == arguments


def test_a_completions_prompt_is_its_text() -> None:
    assert asked(COMPLETION) == {"model": "own", "prompt": "Once"}
    assert asked(COMPLETION | {"add_special_tokens": False})["add_special_tokens"] is False


def test_sent_text_is_not_a_prompt_of_its_own() -> None:
    body = json.loads(tokenize_text("a\n", "own"))
    assert body == {"model": "own", "prompt": "a\n", "add_special_tokens": False}


# --- what it answers ----------------------------------------------------------------------------


def test_the_answer_has_the_ids_and_the_context() -> None:
    answer = b'{"count":2,"max_model_len":4096,"tokens":[5,6],"token_strs":null}'
    assert tokenized(answer) == (Ids(b"[5,6]", 2), 4096)


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"tokens":"a"}', b'{"tokens":null}', b"\xff"])
def test_an_answer_that_is_none(answer: bytes) -> None:
    with pytest.raises(CannotContinue):
        tokenized(answer)
