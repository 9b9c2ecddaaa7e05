from __future__ import annotations

import json
import re
from typing import Any

import pydantic
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
        (b'{"model":"m","x":"\\ud800 "}', r"half of a surrogate pair, \\ud800, which is no text \(byte 18\)"),
        (b'{"model":"m","x":"\\udc00"}', r"surrogate pair, \\udc00"),
        (b'{"model":"m","x":"\\ud83d\\ude00\\\\\\ud83d\\u0041"}', r"pair, \\ud83d, .*byte 32"),
        (b'{"model":"m\\uDBFF"}', r"surrogate pair, \\uDBFF"),
        (b'{"\\uDFFF":1}', r"surrogate pair, \\uDFFF"),
        (b'{"model":"m","x":"' + b"x" * 9000 + b'\\ud800"}', r"surrogate pair, \\ud800"),
        (b'{"model":"m","x":"\\\\ud800', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"model"', "must be a JSON object"),
        (b'{"model":"m"} {}', "not valid JSON"),
        (b'{"model":"m","x":nul}', "not valid JSON"),
        (b'{"model":"m","x":"\xff"}', "UTF-8"),
        (b'{"model":"m","\xff":1}', "UTF-8"),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 128 levels deep"),
        (
            b'{"model":"m","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
            "nested more than 128 levels deep",
        ),
        (b'{"model":"m","x":' + b"[" * 128 + b"]" * 128 + b"}", "nested more than 128 levels deep"),
        (b'{"model":7}', "'model' is wrong"),
        (b'{"model":"m","stream":"perhaps"}', "'stream' is wrong"),
        (b'{"model":"m","stream_options":[]}', "'stream_options' is wrong"),
        (b'{"model":"m","stream_options":{"include_usage":"perhaps"}}', "'stream_options' is wrong"),
        (b'{"model":"m","max_tokens":"five"}', "'max_tokens' is wrong"),
        (b'{"model":"m","max_tokens":1.5}', "'max_tokens' is wrong"),
        (b'{"model":"m","max_tokens":NaN}', "'max_tokens' is wrong"),
        (b'{"model":"m","max_tokens":1e400}', "'max_tokens' is wrong"),
        (b'{"model":"m","echo":2}', "'echo' is wrong"),
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
        ({"max_completion_tokens": 0, "messages": []}, "no token asked for"),
        ({"max_completion_tokens": 0}, None),
        ({"max_completion_tokens": "nonsense"}, None),
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


_BLANKS = st.text(st.sampled_from(" \t\n\r"), max_size=3) | st.sampled_from(
    [" " * 62, " " * 63, "\n" * 64, " " * 5000]
)
_PROMPTS = [
    ('["a","b"]', "several prompts"),
    ("[[1,2],[3]]", "several prompts"),
    ("[]", "several prompts"),
    ('[""]', "several prompts"),
    ("[[]]", "several prompts"),
    ('["a"]', None),
    ("[[1,2]]", None),
    ("[1,2]", None),
    ('"a"', None),
    ('"[["', None),
]


@given(data=st.data(), prompt=st.sampled_from(_PROMPTS))
def test_the_shape_of_a_prompt_does_not_depend_on_white_space(
    data: st.DataObject, prompt: tuple[str, Any]
) -> None:
    text, reason = prompt
    marks = re.findall(r'"[^"]*"|[0-9]+|.', text)
    spaced = "".join(data.draw(_BLANKS) + mark for mark in marks) + data.draw(_BLANKS)
    view = view_request(f'{{"model":"m","prompt":{spaced}}}'.encode())
    single = json.loads(text)
    if reason is None and isinstance(single, list) and len(single) == 1:
        single = single[0]
    assert view.whole_reason == reason
    assert json.loads(joined(view.common)) == {"prompt": single}


def test_a_list_of_one_prompt_is_unwrapped() -> None:
    assert joined(view_request(b'{"model":"m","prompt":[ "a" ]}').common) == b'{"prompt":"a"}'
    assert joined(view_request(b'{"model":"m","prompt":[[1, 2]]}').common) == b'{"prompt":[1, 2]}'


@pytest.mark.parametrize(
    ("prompt", "whole_reason"),
    [('["a",NaN]', "several prompts"), ("[NaN]", None), ("[[NaN],[1]]", "several prompts")],
)
def test_a_prompt_that_no_worker_takes_is_left_to_them(prompt: str, whole_reason: str | None) -> None:
    assert view_request(f'{{"model":"m","prompt":{prompt}}}'.encode()).whole_reason == whole_reason


# --- values as vLLM takes them ------------------------------------------------------------------

_INTS = ["0", "1", "-1", "2", "7.0", "1e1", "0.0", "-0.0", "1.5", "1e400", "1" * 30, "NaN"]
_STRINGS = ['"5"', '"0"', '" 0 "', '"0.0"', '"1_0"', '"yes"', '"No"', '"perhaps"', '""']
_LAX = st.sampled_from([*_INTS, *_STRINGS, "true", "false", "null", "[]", "{}"])
# What vLLM (0.32) says of them, in chats and completions alike.
_TYPES: dict[str, Any] = {
    "stream": bool | None,
    "max_tokens": int | None,
    "max_completion_tokens": int | None,
    "echo": bool | None,
    "use_beam_search": bool | None,
    "prompt_logprobs": int | None,
}


class _Options(pydantic.BaseModel):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Routed(pydantic.BaseModel):
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    echo: bool | None = False
    use_beam_search: bool | None = False
    prompt_logprobs: int | None = None
    stream_options: _Options | None = None


def _written(fields: dict[str, str]) -> str:
    """Return an object of values that are JSON already."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


_OPTIONS = st.dictionaries(
    st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), _LAX, max_size=3
)
_WRITTEN_OPTIONS = _OPTIONS.map(_written)


@given(
    given=st.dictionaries(st.sampled_from(sorted(_TYPES)), _LAX, max_size=3),
    options=st.none() | _WRITTEN_OPTIONS | _LAX,
)
def test_routed_fields_are_read_as_vllm_reads_them(given: dict[str, str], options: str | None) -> None:
    fields = given if options is None else {**given, "stream_options": options}
    body = _written({"model": '"m"', "messages": "[]", **fields})
    try:
        read = _Routed.model_validate(json.loads(body))
    except pydantic.ValidationError:
        with pytest.raises(InvalidRequest, match="is wrong"):
            view_request(body.encode())
        return
    view = view_request(body.encode())
    assert view.is_stream is bool(read.stream)
    assert view.wants_usage is bool(read.stream_options and read.stream_options.include_usage)
    assert view.whole_reason == _reason(read)
    assert {name: bytes(view.field(name) or b"").decode() for name in fields} == fields


def _reason(read: _Routed) -> str | None:
    if 0 in (read.max_tokens, read.max_completion_tokens):
        return "no token asked for"
    if read.use_beam_search:
        return "beam search"
    if read.prompt_logprobs is not None:
        return "prompt_logprobs"
    return "echo" if read.echo else None


@pytest.mark.parametrize("body", [b'{"x":1}', b'{"model":""}', b'{"model":null}'])
def test_a_request_need_not_name_its_model(body: bytes) -> None:
    view = view_request(body)
    assert view.model == ""
    named = view.for_model("org/m")
    assert named.model == "org/m"
    assert json.loads(joined(named.common)) | json.loads(named.own_json) == json.loads(body) | {
        "model": "org/m"
    }


_PYTHONS = st.recursive(
    st.floats() | st.sampled_from(["NaN", '"NaN,', "-Infinity]\\", "a"]) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["NaN", 'b"', "c"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=_PYTHONS, other=_PYTHONS, has_bom=st.booleans(), pad=st.sampled_from(["", "x" * 9000]))
def test_what_pythons_json_writes_is_taken(value: object, other: object, has_bom: bool, pad: str) -> None:
    text = json.dumps({"model": "m", "stop": value, "pad": pad, "x": other})
    view = view_request((b"\xef\xbb\xbf" if has_bom else b"") + text.encode())
    seen = json.loads(joined(view.common)) | json.loads(view.own_json)
    assert json.dumps(seen, sort_keys=True) == json.dumps(json.loads(text), sort_keys=True)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","x":nan}',
        b'{"model":"m","x":NaN',
        b'{"model":"m","x":"NaN}',
        b'{"model":"m","x":"\\"NaN}\\',
        b"\xef\xbb\xbf",
        b'\xef\xbb\xbf\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m","x":NaN,"y":"\xff"}',
        b'{"model":"m","x":[NaN' + b',""' * 100_000 + b"]}",  # too many strings to look for it
        b'{"model":"m","x":NaN,"y":"\0"}',
        b'{"model":"m","x":NaN,"y":"\0\1"}',
    ],
)
def test_what_is_no_json_in_python_either_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid|empty|more than 1000 fields|UTF-8"):
        view_request(body)


def test_a_routed_field_given_twice_beside_a_constant_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="given twice"):
        view_request(b'\xef\xbb\xbf{"model":"m","x":NaN,"stream":true,"stream":false}')


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
