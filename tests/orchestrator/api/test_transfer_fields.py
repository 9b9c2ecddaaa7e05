"""What names KV blocks and hosts is said by workers alone: a client gets it into no leg, however spelt."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.embeddings import ask_base64
from orchestrator.api.messages import MessagesForm
from orchestrator.api.responses import ResponsesForm
from orchestrator.api.view import MAX_FIELDS, InvalidRequest, RequestView, view_request
from orchestrator.failover.tokenize import tokenize_prompt
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.nixl import handoff_from
from orchestrator.wire.codec import CODECS, Codec
from tests.orchestrator.legs.test_bodies import KV
from tests.orchestrator.wire.cut_streams import Client, SimWorker, sent_of, view_of
from tests.orchestrator.wire.documents import documents, joined, spellings, values

FIELDS = ("kv_transfer_params", "ec_transfer_params")
IDS = {"prompt_token_ids": [1, 2]}
HANDOFF = handoff_from(json.dumps({"kv_transfer_params": KV}).encode())
WITH_IDS = handoff_from(json.dumps({"kv_transfer_params": KV, **IDS}).encode(), has_ids=True)

codecs = pytest.mark.parametrize("codec", [CODECS["json"], CODECS["msgpack"]], ids=lambda codec: codec.name)


def legs(view: RequestView, codec: Codec) -> dict[str, Any]:
    """All that workers can get of a request, as they read it."""
    bodies = LegBodies(view)
    parts: dict[str, Any] = {}
    for form in (ResponsesForm(), MessagesForm()):
        others = LegBodies(view, form=form)
        others.call("resp_1")
        parts |= {
            f"prefill {form}": others.prefill(codec, "m"),
            f"decode {form}": others.decode(codec, "m", HANDOFF),
            f"release {form}": others.release(codec, "m", HANDOFF, "salt"),
            f"whole {form}": others.whole(codec, "m"),
        }
    parts |= {
        "prefill": bodies.prefill(codec, "m"),
        "prefill for ids": bodies.prefill(codec, "m", asks_ids=True),
        "decode": bodies.decode(codec, "m", HANDOFF),
        "decode elsewhere": bodies.decode(codec, "another name", HANDOFF),
        "release": bodies.release(codec, "m", HANDOFF, "salt"),
        "whole": bodies.whole(codec, "m"),
        "embeddings": LegBodies(ask_base64(view)).whole(codec, "m"),
    }
    if bodies.takes_ids:
        parts["decode with ids"] = bodies.decode(codec, "m", WITH_IDS)
    return {name: seen(codec, body) for name, body in parts.items()}


def seen(codec: Codec, parts: Any) -> Any:
    body = joined(parts)
    return msgspec.msgpack.decode(body) if codec.name == "msgpack" else json.loads(body)


def is_ours(params: Any) -> bool:
    """What a leg says itself: a prefill leg that the blocks are to be kept, the others the hand-off."""
    return params["do_remote_decode"] is True or {**KV, **IDS}.items() >= params.items()


def assert_only_ours(document: dict[str, Any]) -> None:
    assert "ec_transfer_params" not in document
    assert is_ours(document.get("kv_transfer_params", KV))
    for name in ("vllm_xargs", "extra_args", "sampling_params"):
        value = document.get(name)
        while isinstance(value, str) and value.lstrip()[:1] == "{":
            value = json.loads(value)
        if isinstance(value, dict):
            assert not value.keys() & set(FIELDS)
            assert_only_ours({"extra_args": value.get("extra_args"), "vllm_xargs": value.get("vllm_xargs")})


def escaped(name: str, source: random.Random) -> str:
    """A name with some of its letters as escapes, in JSON."""
    letters = (f"\\u{ord(c):04x}" if source.random() < 0.3 else json.dumps(c)[1:-1] for c in name)
    return '"' + "".join(letters) + '"'


def written(pairs: list[tuple[str, str]], source: random.Random) -> str:
    """A JSON object of names and values in JSON, with white space where it may be."""
    space = source.choice(["", " ", "\n\t"])
    return "{" + f"{space},".join(f"{escaped(k, source)}{space}:{space}{v}" for k, v in pairs) + space + "}"


# Carriers of every kind, with the fields once, twice, or not at all among others.
names = st.sampled_from([*FIELDS, *FIELDS, "session_id", "x", "", 'a"\\'])
small = values.map(json.dumps)
arguments = st.lists(st.tuples(names, small | st.just('""')), max_size=6)


@codecs
@given(st.data())
def test_no_spelling_gets_through(codec: Codec, data: st.DataObject) -> None:
    source = random.Random(data.draw(st.integers(0, 2**32)))
    document = {"model": "m", **data.draw(st.sampled_from([{"prompt": ["a", "b"]}, {"messages": []}]))}
    fields = [(name, json.dumps(value)) for name, value in document.items()]
    for name in data.draw(st.lists(st.sampled_from(["vllm_xargs", "extra_args"]), max_size=3)):
        given_ = written(data.draw(arguments), source)
        if data.draw(st.integers(0, 4)) == 0:
            given_ = json.dumps(given_)  # as forms have it
        fields.append((name, given_))
    for name in data.draw(st.sets(st.sampled_from(FIELDS))):
        fields.append((name, data.draw(small)))
    if data.draw(st.booleans()):
        inner = written(data.draw(arguments), source)
        fields.append(("sampling_params", written([("extra_args", inner), ("n", "1")], source)))
    if data.draw(st.booleans()):
        fields.append(("padding", json.dumps("x" * 9000)))
    source.shuffle(fields)
    view = view_request(written(fields, source).encode())
    for leg in legs(view, codec).values():
        assert_only_ours(leg)


@codecs
@given(st.data())
def test_everything_else_of_the_arguments_stays(codec: Codec, data: st.DataObject) -> None:
    document = data.draw(documents())
    others = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values, max_size=4)
    kept = {name: value for name, value in data.draw(others).items() if name not in FIELDS}
    taken = {name: data.draw(values) for name in data.draw(st.sets(st.sampled_from(FIELDS)))}
    body = data.draw(spellings({**document, "vllm_xargs": {**kept, **taken}}))
    whole = seen(codec, LegBodies(view_request(body)).whole(codec, document["model"]))
    own = {name: value for name, value in document.items() if name not in FIELDS}
    assert whole == {**own, "vllm_xargs": kept}


def test_constants_that_only_python_knows_hide_nothing() -> None:
    for value in ('{"a":NaN,"kv_transfer_params":""}', json.dumps('{"a":NaN,"kv_transfer_params":""}')):
        view = view_request(f'{{"model":"m","vllm_xargs":{value}}}'.encode())
        assert (
            joined(view.common)
            == b'{"vllm_xargs":%b}'
            % value.replace(',"kv_transfer_params":""', "")
            .replace(',\\"kv_transfer_params\\":\\"\\"', "")
            .encode()
        )


def test_arguments_without_these_fields_keep_their_bytes() -> None:
    for arguments in (b'{ "a": 1.0e0 ,"b":"\\u0041" }', b'"text"', b'" {\\"a\\": 1}"', b"[ 1 ]", b"{ }"):
        body = b'{"model":"m","vllm_xargs":%b}' % arguments
        assert joined(view_request(body).common) == b'{"vllm_xargs":%b}' % arguments


@pytest.mark.parametrize(
    "value", ["7", "true", '"kv_transfer_params"', '[["kv_transfer_params", ""]]', "null"]
)
def test_arguments_that_are_no_object_are_for_the_worker_to_judge(value: str) -> None:
    view = view_request(f'{{"model":"m","vllm_xargs":{value}}}'.encode())
    assert json.loads(joined(view.common))["vllm_xargs"] == json.loads(value)


@pytest.mark.parametrize(
    "value",
    [
        json.dumps('{"a": nan, "kv_transfer_params": ""}'),
        json.dumps('{"kv_transfer_params": '),
        json.dumps('{"kv_transfer_params": ' + "[" * 100_000),
    ],
    ids=["no JSON in a string", "half a string", "a deep string"],
)
def test_arguments_that_cannot_be_read_here_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="vllm_xargs") as caught:
        view_request(f'{{"model":"m","vllm_xargs":{value}}}'.encode())
    assert caught.value.param == "vllm_xargs"


def test_arguments_are_bounded_where_they_are_looked_through() -> None:
    many = ",".join(f'"a{number}":1' for number in range(MAX_FIELDS + 1))
    view_request(f'{{"model":"m","vllm_xargs":{{{many}}}}}'.encode())
    with pytest.raises(InvalidRequest, match="more than 1000 fields"):
        view_request(f'{{"model":"m","vllm_xargs":{{"kv_transfer_params":"",{many}}}}}'.encode())


def test_names_elsewhere_are_the_clients_text() -> None:
    document = {"model": "m", "messages": [{"role": "user", "content": "kv_transfer_params"}]}
    document["chat_template_kwargs"] = {"kv_transfer_params": 1}
    bodies = LegBodies(view_request(json.dumps(document).encode()))
    assert json.loads(joined(bodies.whole(CODECS["json"], "m"))) == document


# --- a stream that goes on ----------------------------------------------------------------------

ARGUMENTS = {
    "vllm_xargs": {"kv_transfer_params": ""},
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": 2,
}


class Listening(SimWorker):
    """Keeps the requests whose legs it is asked."""

    def __init__(self) -> None:
        self.views: list[RequestView] = []

    def stream(self, view: RequestView, request_id: str) -> bytes:
        self.views.append(view)
        return super().stream(view, request_id)


@codecs
@pytest.mark.parametrize("prompt", [{"messages": [{"role": "user", "content": "tell"}]}, {"prompt": "tell"}])
def test_legs_that_go_on_with_a_stream_have_none_either(codec: Codec, prompt: dict[str, Any]) -> None:
    view = view_of({"model": "m", "stream": True, "max_tokens": 9, "temperature": 0, **prompt, **ARGUMENTS})
    worker = Listening()
    Client(view, worker=worker).read([len(Client(view).read()) // 2])
    _, rest = worker.views
    for leg in legs(rest, codec).values():
        assert_only_ours(leg)


def test_questions_for_token_ids_have_none() -> None:
    messages = [{"role": "user", "content": "tell"}]
    view = view_of({"model": "m", "stream": True, "messages": messages, **ARGUMENTS})
    asked = json.loads(tokenize_prompt(view, sent_of(), "m"))
    assert asked == {"model": "m", "messages": messages}
