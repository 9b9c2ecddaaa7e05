from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.view import EMBEDDING_FORM, view_request
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.nixl import handoff_from
from orchestrator.wire.codec import CODECS, JSON, Codec, NotEncodable, TooLarge, transcoded
from tests.orchestrator.wire.documents import documents, joined, spellings

KV: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e1",
    "remote_block_ids": [[1, 2, 3]],
    "remote_request_id": "r1",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "something_new": {"kept": [True]},
}
HANDOFF = handoff_from(json.dumps({"kv_transfer_params": KV | {"remote_prefill_cached_tokens": 16}}).encode())
REMOVED_BY_PREFILL = EMBEDDING_FORM | {
    "stream_options",
    "min_tokens",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    # Of other APIs, whose prefill legs say something else than the client.
    *("background", "max_output_tokens", "request_id", "return_token_ids", "stop_sequences", "store"),
}
KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

codecs = pytest.mark.parametrize("codec", [CODECS["json"], CODECS["msgpack"]], ids=lambda codec: codec.name)


def seen(codec: Codec, parts: Any) -> Any:
    """What a worker makes of a leg's body."""
    body = joined(parts)
    return msgspec.msgpack.decode(body) if codec.name == "msgpack" else json.loads(body)


def without_kv(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if not key.endswith("_transfer_params")}


@codecs
@given(st.data())
def test_prefill_is_the_clients_document_with_the_overlay(codec: Codec, data: st.DataObject) -> None:
    document = data.draw(documents())
    bodies = LegBodies(view_request(data.draw(spellings(document))))
    expected = {key: value for key, value in without_kv(document).items() if key not in REMOVED_BY_PREFILL}
    expected |= {"stream": False, "max_tokens": 1, "ignore_eos": True, "kv_transfer_params": KEEP_KV}
    if "max_completion_tokens" in document:
        expected["max_completion_tokens"] = 1
    assert seen(codec, bodies.prefill(codec, document["model"])) == expected


@codecs
@pytest.mark.parametrize("name", sorted(REMOVED_BY_PREFILL))
def test_what_prefill_leaves_out_decode_keeps(codec: Codec, name: str) -> None:
    bodies = LegBodies(view_request(json.dumps({"model": "m", name: None, "other": None}).encode()))
    prefill, decode = (
        seen(codec, parts) for parts in (bodies.prefill(codec, "m"), bodies.decode(codec, "m", HANDOFF))
    )
    assert (name in prefill, name in decode) == (False, True)
    assert "other" in prefill
    assert "other" in decode


@codecs
@given(st.data())
def test_decode_is_the_clients_document_with_the_handoff(codec: Codec, data: st.DataObject) -> None:
    document = data.draw(documents())
    bodies = LegBodies(view_request(data.draw(spellings(document))))
    expected = without_kv(document) | {"kv_transfer_params": KV}
    if document.get("stream") and not (document.get("stream_options") or {}).get("include_usage"):
        expected["stream_options"] = {"include_usage": True}
    assert seen(codec, bodies.decode(codec, document["model"], HANDOFF)) == expected


@codecs
@given(st.data())
def test_whole_is_the_clients_document(codec: Codec, data: st.DataObject) -> None:
    document = data.draw(documents())
    bodies = LegBodies(view_request(data.draw(spellings(document))))
    assert seen(codec, bodies.whole(codec, document["model"])) == without_kv(document)


@codecs
def test_release_asks_for_one_token_and_brings_the_handoff(codec: Codec) -> None:
    body = b'{"model":"m","messages":[1],"stop":7,"stream":true,"n":"x","max_completion_tokens":9}'
    sent = seen(codec, LegBodies(view_request(body)).release(codec, "m", HANDOFF, "req-1"))
    assert sent == {
        "model": "m",
        "messages": [1],
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "ignore_eos": True,
        "kv_transfer_params": KV,
        "cache_salt": "req-1",
    }


@codecs
def test_what_a_release_pulls_is_cached_for_nobody(codec: Codec) -> None:
    bodies = LegBodies(view_request(b'{"model":"m","cache_salt":"the client\'s","prompt":"a"}'))
    parts = bodies.release(codec, "m", HANDOFF, "req-1")
    assert b"the client's" not in b"".join(parts)
    sent = seen(codec, parts)
    assert (sent["cache_salt"], sent["prompt"]) == ("req-1", "a")
    assert seen(codec, bodies.whole(codec, "m"))["cache_salt"] == "the client's"


@codecs
def test_the_workers_own_model_name_is_used(codec: Codec) -> None:
    bodies = LegBodies(view_request(b'{"model":"public","prompt":"a"}'))
    legs = (bodies.prefill, bodies.whole)
    assert [seen(codec, leg(codec, "internal"))["model"] for leg in legs] == ["internal"] * 2
    assert seen(codec, bodies.decode(codec, "internal", HANDOFF))["model"] == "internal"


def test_json_values_keep_their_bytes() -> None:
    body = b'{"model":"m", "messages": [ {"role":"user" , "content":"\\u00e4"} ], "x": 1.0e0, "stop": ["a" ]}'
    bodies = LegBodies(view_request(body))
    sent = joined(bodies.decode(JSON, "m", HANDOFF))
    for value in (b'[ {"role":"user" , "content":"\\u00e4"} ]', b"1.0e0", b'["a" ]'):
        assert value in sent


LARGE: dict[str, Any] = {"messages": "é" * 20_000, "tools": [{"name": "t"}] * 5_000}


@pytest.mark.parametrize(
    "fields",
    [LARGE, {"x": 1, **LARGE}, {"messages": LARGE["messages"], "y": [2]}, {"tools": LARGE["tools"]}],
    ids=["only large", "several large", "one large", "no small"],
)
def test_large_values_are_not_copied(fields: dict[str, Any]) -> None:
    document = {"model": "m", **fields}
    bodies = LegBodies(view_request(json.dumps(document, ensure_ascii=False).encode()))
    parts = bodies.whole(JSON, "m")
    assert seen(JSON, parts) == document
    copies = [part for part in parts if isinstance(part, bytes)]
    assert sum(map(len, copies)) < 200


@pytest.mark.parametrize("fields", [0, 12, 13, 14, 20, 990])
def test_msgpack_maps_of_every_size_are_joined(fields: int) -> None:
    document = {"model": "m", "stream": True} | {f"k{index}": index for index in range(fields)}
    bodies = LegBodies(view_request(json.dumps(document).encode()))
    codec = CODECS["msgpack"]
    assert seen(codec, bodies.whole(codec, "m")) == document


def test_a_large_body_is_transcoded_elsewhere() -> None:
    document = {"model": "m", "user": "x" * 100_000}
    bodies, codec = LegBodies(view_request(json.dumps(document).encode())), CODECS["msgpack"]
    assert bodies.to_transcode(JSON) is None
    with pytest.raises(TooLarge):
        bodies.whole(codec, "m")
    common = bodies.to_transcode(codec)
    assert common is not None
    is_encodable, packed = transcoded(common)
    assert is_encodable
    bodies.adopt(codec, packed)
    assert seen(codec, bodies.whole(codec, "m")) == document


@pytest.mark.parametrize("value", ["99999999999999999999", "-9223372036854775809"])
def test_integers_over_64_bits_do_not_fit_into_msgpack(value: str) -> None:
    bodies = LegBodies(view_request(f'{{"model":"m","seed":{value}}}'.encode()))
    with pytest.raises(NotEncodable):
        bodies.prefill(CODECS["msgpack"], "m")
    assert f'"seed":{value}'.encode() in joined(bodies.prefill(JSON, "m"))
