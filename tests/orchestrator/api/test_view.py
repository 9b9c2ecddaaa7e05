from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.view import OWN, ROUTED, InvalidRequest, view_request
from tests.orchestrator.fakes import FakeExchange
from tests.orchestrator.wire.documents import documents, joined, spellings


@given(st.data())
def test_every_value_is_the_clients_own(data: st.DataObject) -> None:
    document = data.draw(documents())
    view = view_request(data.draw(spellings(document)))
    assert json.loads(joined(view.common)) | json.loads(view.own_json) == document
    assert view.own.keys() == document.keys() & OWN
    assert view.model == document["model"]
    assert view.is_stream == bool(document.get("stream"))
    assert view.whole_reason is None


def test_values_keep_their_bytes() -> None:
    body = b'{ "model": "m", "temperature": 1.50e0, "x": {"b": [ 1 ,2 ], "a":"\\u0041"} }'
    assert joined(view_request(body).common) == b'{"temperature":1.50e0,"x":{"b": [ 1 ,2 ], "a":"\\u0041"}}'


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"model"', "must be a JSON object"),
        (b'{"model":"m"} {}', "not valid JSON"),
        (b'{"model":"m","x":nul}', "not valid JSON"),
        (b'{"model":"m","x":"\xff"}', "UTF-8"),
        (b'{"model":"m","\xff":1}', "UTF-8"),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model":"m","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
        (b'{"messages":[]}', "'model' is required"),
        (b'{"model":""}', "'model' is required"),
        (b'{"model":null}', "'model' is wrong"),
        (b'{"model":7}', "'model' is wrong"),
        (b'{"model":"m","stream":"yes"}', "'stream' is wrong"),
        (b'{"model":"m","stream_options":[]}', "'stream_options' is wrong"),
        (b'{"model":"m","max_tokens":"5"}', "'max_tokens' is wrong"),
        (b'{"model":"m","max_tokens":1.5}', "'max_tokens' is wrong"),
        (b'{"model":"m","echo":0}', "'echo' is wrong"),
    ],
)
def test_bad_documents_are_refused_with_a_reason(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        view_request(body)


def _padding(size: int) -> str:
    return '"pad": "%s", ' % ("x" * size)


@pytest.mark.parametrize("pad", ["", _padding(20_000)], ids=["small", "large"])
@pytest.mark.parametrize("name", [*ROUTED, "prompt", "kv_transfer_params"])
@pytest.mark.parametrize("spelling", ["%s", "\\u%04x"])
@pytest.mark.parametrize("space", ["", " "])
def test_a_routed_field_given_twice_is_refused(name: str, spelling: str, space: str, pad: str) -> None:
    again = name if spelling == "%s" else spelling % ord(name[0]) + name[1:]
    first, second = ("m", "m") if name == "model" else (None, None)
    model = "" if name == "model" else '"model":"m",'
    body = f'{{{pad}{model}"{name}":{space}{json.dumps(first)},"x":1,"{again}":{json.dumps(second)}}}'
    with pytest.raises(InvalidRequest, match="given twice") as caught:
        view_request(body.encode())
    assert caught.value.param == name


@pytest.mark.parametrize("pad", ["", _padding(20_000)], ids=["small", "large"])
def test_other_fields_given_twice_keep_their_last_value(pad: str) -> None:
    view = view_request(f'{{{pad}"model":"m", "x":1, "x":2}}'.encode())
    assert json.loads(joined(view.common))["x"] == 2


@pytest.mark.parametrize("pad", ["", _padding(20_000)], ids=["small", "large"])
def test_names_inside_values_are_no_duplicates(pad: str) -> None:
    inner = {"model": "other", "stream": [{"model": 'say "model": "x"'}]}
    text = f'{{{pad}"model": "m", "messages": {json.dumps(inner)}, "we\\"ird\\\\": "\\u0041"}}'
    view = view_request(text.encode())
    assert view.model == "m"
    assert set(json.loads(joined(view.common))) >= {"messages", 'we"ird\\'}


def test_a_large_body_has_a_bounded_number_of_fields() -> None:
    fields = ",".join(f'"f{number}":1' for number in range(999))
    padding = '"messages":"%s"' % ("x" * 20_000)
    view_request(f'{{{fields},"model":"m"}}'.encode())
    with pytest.raises(InvalidRequest, match="more than 1000 fields"):
        view_request(f'{{{fields},{padding},"model":"m"}}'.encode())


def test_a_value_that_imitates_the_rest_of_the_document_hides_no_duplicate() -> None:
    # The last "model" is as long as the text between the first one and the end.
    tail = ',"x":"b","model":'
    crafted = f'{{"model":"a"{tail}{json.dumps("c" * 20_000)}}}'
    with pytest.raises(InvalidRequest, match="given twice"):
        view_request(crafted.encode())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_beam_search": True}, "beam search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "no token asked for"),
        ({"max_completion_tokens": 0}, "no token asked for"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": [[1, 2], [3]]}, "several prompts"),
        ({"prompt": []}, "several prompts"),
        ({"prompt": ["a"]}, None),
        ({"prompt": [[1, 2]]}, None),
        ({"prompt": [1, 2]}, None),
        ({"prompt": "a"}, None),
        ({"prompt_embeds": None, "prompt_logprobs": None, "echo": False}, None),
    ],
)
def test_what_cannot_be_handed_over_is_named(fields: dict[str, Any], reason: str | None) -> None:
    assert view_request(json.dumps({"model": "m", **fields}).encode()).whole_reason == reason


def test_a_list_of_one_prompt_is_unwrapped() -> None:
    assert joined(view_request(b'{"model":"m","prompt":[ "a" ]}').common) == b'{"prompt":"a"}'
    assert joined(view_request(b'{"model":"m","prompt":[[1, 2]]}').common) == b'{"prompt":[1, 2]}'


def test_white_space_without_end_costs_little() -> None:
    spaces = b" " * 1_000_000
    body = b'{"model"' + spaces + b":" + spaces + b'"m"' + spaces + b"}" + spaces
    assert view_request(body).model == "m"


@pytest.mark.parametrize(
    ("options", "wants"),
    [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True)],
)
def test_whether_the_client_wants_the_usage_event(options: Any, wants: bool) -> None:
    body = json.dumps({"model": "m", "stream": True, "stream_options": options}).encode()
    assert view_request(body).wants_usage is wants


# --- what routing policies may ask --------------------------------------------------------------

ASKED = b'{"stop":[],"messages":[{"content":"hi"}],"model":"m","tools":[1],"n":1}'


@pytest.mark.parametrize("most", range(0, 40, 3))
def test_a_prompt_begins_with_what_the_model_reads_first(most: int) -> None:
    assert view_request(ASKED).prompt(most) == b'[1][{"content":"hi"}]'[:most]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("[1,2]", [1, 2]), ("[[1,2]]", [1, 2]), ("[[1],[2]]", None), ('["a","b"]', None), ('"a"', None)],
)
def test_the_ids_of_a_prompt_are_those_that_the_client_sent(prompt: str, ids: list[int] | None) -> None:
    assert view_request(f'{{"model":"m","prompt":{prompt}}}'.encode()).prompt_ids() == ids


def test_a_chat_has_no_ids() -> None:
    assert view_request(ASKED).prompt_ids() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", b"[1]"), ("n", b"1"), ("model", b'"m"'), ("user", None)],
)
def test_a_field_is_the_clients_own_bytes(name: str, value: bytes | None) -> None:
    found = view_request(ASKED).field(name)
    assert (None if found is None else bytes(found)) == value


def test_a_body_is_measured_without_its_white_space() -> None:
    spaced = ASKED.replace(b",", b", \n")
    assert view_request(spaced).body_bytes() - view_request(ASKED).body_bytes() == 0
    assert abs(view_request(ASKED).body_bytes() - len(ASKED)) <= 2


def test_a_header_is_found_where_there_is_a_client() -> None:
    exchange = FakeExchange(ASKED, headers=[(b"x-session", b"7")])
    view = view_request(ASKED, exchange)
    assert view.header(b"x-session") == b"7"
    assert view.with_own(dict(view.own)).header(b"x-session") == b"7"
    assert view.header(b"cookie") is None
    assert view_request(ASKED).header(b"x-session") is None
