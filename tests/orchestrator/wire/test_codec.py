from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from orchestrator.wire.codec import (
    CODECS,
    JSON,
    MAX_INLINE_BYTES,
    TOKEN_IDS_KEY,
    Codec,
    NotEncodable,
    TooLarge,
    json_object,
    transcoded,
)
from orchestrator.wire.info import MSGPACK_HEADER
from tests.orchestrator.wire.documents import joined, keys, scalars, spellings, values

MSGPACK = CODECS["msgpack"]
LARGEST_COPIED = 16 * 1024  # bytes of a value that is still copied

codecs = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=lambda codec: codec.name)

# What one codec carries and the other does not, or neither. None of it may come out as something else.
NOT_IN_MSGPACK = {
    "an integer of over 64 bits": b'{"seed":18446744073709551616}',
    "a negative one": b'{"seed":-9223372036854775809}',
    "deep nesting": b'{"a":%b%b}' % (b"[" * 5_000, b"]" * 5_000),
    "half a surrogate pair": rb'{"a":"\ud83d"}',
    "bytes that are no UTF-8": b'{"a":"\xff"}',
    "an object cut short": b'{"a":1',
}


def seen(codec: Codec, parts: Any) -> Any:
    """What a worker makes of a leg's body."""
    body = joined(parts)
    return msgspec.msgpack.decode(body) if codec.name == "msgpack" else json.loads(body)


def numbered(prefix: str, count: int) -> dict[str, Any]:
    return {f"{prefix}{number}": number for number in range(count)}


def packed(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A common part and an overlay; no key is in both."""
    document = draw(st.dictionaries(keys, values, max_size=20))
    ours = draw(st.sets(st.sampled_from(sorted(document)))) if document else set()
    return (
        {key: value for key, value in document.items() if key not in ours},
        {key: document[key] for key in ours},
    )


# --- objects of raw values ----------------------------------------------------------------------


@given(
    st.dictionaries(keys, scalars, max_size=4),
    st.dictionaries(keys, st.integers(LARGEST_COPIED - 3, LARGEST_COPIED + 3), max_size=3),
)
def test_an_object_has_every_field_once(small: dict[str, Any], sizes: dict[str, int]) -> None:
    document = small | {name: "x" * size for name, size in sizes.items()}
    fields = {name: Raw(json.dumps(value).encode()) for name, value in document.items()}
    parts = json_object(fields)
    pairs = json.loads(joined(parts), object_pairs_hook=list)
    assert len(pairs) == len(fields)
    assert dict(pairs) == document
    assert isinstance(parts[-1], bytes)
    assert parts[-1].endswith(b"}")


def test_an_object_without_fields() -> None:
    assert json_object({}) == (b"{}",)


def test_values_are_copied_up_to_a_size() -> None:
    copied, lent = Raw(b"1" * LARGEST_COPIED), Raw(b"2" * (LARGEST_COPIED + 1))
    assert json_object({"a": copied}) == (b'{"a":' + bytes(copied) + b"}",)
    parts = json_object({"a": copied, "b": lent})
    assert [type(part) for part in parts] == [bytes, memoryview, bytes]
    assert parts[1].obj is memoryview(lent).obj  # type: ignore[union-attr]


# --- legs ---------------------------------------------------------------------------------------


@codecs
@given(pairs(), st.data())
def test_a_leg_is_the_common_part_and_the_overlay(
    codec: Codec, pair: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject
) -> None:
    common, overlay = pair
    own = msgspec.json.encode(overlay)
    parts = codec.common((msgspec.json.encode(common),))
    assert seen(codec, codec.leg(parts, own)) == common | overlay
    assert list(seen(codec, codec.leg(parts, own))) == [*common, *overlay]
    assert seen(codec, codec.leg(parts, b"{}")) == common  # the first leg has left it as it was


@codecs
@pytest.mark.parametrize("of_common", [0, 1, 14, 15, 16, 17, 300, 1000])
@pytest.mark.parametrize("of_overlay", [0, 1, 2, 15, 16])
def test_objects_of_every_size_are_joined(codec: Codec, of_common: int, of_overlay: int) -> None:
    common, overlay = numbered("common", of_common), numbered("own", of_overlay)
    legs = codec.leg(codec.common((packed(common).replace(b" ", b""),)), packed(overlay))
    assert seen(codec, legs) == common | overlay


@codecs
@given(st.data())
def test_the_clients_spelling_of_values_says_the_same(codec: Codec, data: st.DataObject) -> None:
    value = data.draw(values)
    fields = {"a": Raw(data.draw(spellings(value)).strip()), "b": Raw(b"[ 1 ,2]")}
    assert seen(codec, codec.leg(codec.common(json_object(fields)), b'{"c":3}')) == {
        "a": value,
        "b": [1, 2],
        "c": 3,
    }


def test_json_is_handed_on_as_it_is() -> None:
    document = (memoryview(b'{"a": "\\u00e4" '), b',"b":1.0e0}')
    assert JSON.common(document) is document
    assert JSON.leg(document, b"{}") is document
    assert JSON.leg(document, b'{"c":2}') == (document[0], b',"b":1.0e0,"c":2}')
    assert JSON.leg((b"{}",), b'{"c":2}') == (b'{"c":2}',)
    assert JSON.leg((b"{}",), b"{}") == (b"{}",)


def test_json_copies_no_large_end() -> None:
    end = b'{"a":"%b"}' % (b"x" * LARGEST_COPIED)
    view, own = JSON.leg((end,), b'{"b":1}')
    assert isinstance(view, memoryview)
    assert view.obj is end
    assert (bytes(view), own) == (end[:-1], b',"b":1}')


def test_msgpack_does_not_copy_the_common_part() -> None:
    common = MSGPACK.common((b'{"a":1}',))
    _, view, _ = MSGPACK.leg(common, b'{"b":2}')
    assert isinstance(view, memoryview)
    assert view.obj is common[0]


def test_msgpack_takes_a_document_in_parts() -> None:
    assert seen(MSGPACK, MSGPACK.common((b'{"a":', memoryview(b"[1]"), b',"b":2}'))) == {"a": [1], "b": 2}


# --- packed token ids ---------------------------------------------------------------------------


@codecs
@given(st.binary(min_size=1, max_size=64), st.dictionaries(keys, values, max_size=3))
def test_ids_go_among_the_parameters(codec: Codec, ids: bytes, params: dict[str, Any]) -> None:
    params.pop(TOKEN_IDS_KEY, None)
    written = msgspec.json.encode(params)
    leg = seen(codec, codec.leg_with_ids(codec.common((b'{"a":1}',)), b'{"stream":true}', written, ids))
    told = leg["kv_transfer_params"].pop(TOKEN_IDS_KEY)
    assert (base64.b64decode(told) if codec is JSON else told) == ids
    assert leg == {"a": 1, "kv_transfer_params": params, "stream": True}


@pytest.mark.parametrize("count", [0, 255, 256, 65_535, 65_536, 400_000])
def test_ids_of_any_number_stay_bytes_in_msgpack(count: int) -> None:
    """They are no JSON, so the limit of what is transcoded in place is not theirs."""
    ids = bytes(count)
    leg = seen(MSGPACK, MSGPACK.leg_with_ids(MSGPACK.common((b"{}",)), b"{}", b"{}", ids))
    assert leg == {"kv_transfer_params": {TOKEN_IDS_KEY: ids}}


# --- what cannot be encoded, or not here --------------------------------------------------------


@pytest.mark.parametrize("document", NOT_IN_MSGPACK.values(), ids=NOT_IN_MSGPACK)
def test_what_msgpack_does_not_carry_goes_as_json(document: bytes) -> None:
    for encode in (lambda: MSGPACK.common((document,)), lambda: MSGPACK.leg((b"\x80",), document)):
        with pytest.raises(NotEncodable) as refused:
            encode()
        assert not isinstance(refused.value, TooLarge)
    assert transcoded(document) == (False, b"")
    assert joined(JSON.leg(JSON.common((document,)), b'{"b":1}')) == document[:-1] + b',"b":1}'


def test_what_is_too_large_to_be_transcoded_here() -> None:
    fits = b'{"a":"%b"}' % (b"x" * (MAX_INLINE_BYTES - 8))
    assert len(fits) == MAX_INLINE_BYTES
    assert transcoded(fits) == (True, MSGPACK.common((fits,))[0])
    larger = fits.replace(b"x", b"xx", 1)
    for encode in (lambda: MSGPACK.common((larger,)), lambda: MSGPACK.leg((b"\x80",), larger)):
        with pytest.raises(TooLarge, match="would hold up the event loop"):
            encode()
    assert JSON.common((larger,)) == (larger,)


def test_parts_are_too_large_together() -> None:
    half = b"x" * (MAX_INLINE_BYTES // 2)
    with pytest.raises(TooLarge):
        MSGPACK.common((b'{"a":"', half, half, b'"}'))


@pytest.mark.parametrize("size", [0, 10, MAX_INLINE_BYTES, 3 * MAX_INLINE_BYTES])
def test_a_document_transcoded_elsewhere_is_the_common_part(size: int) -> None:
    document = {"a": "x" * size}
    is_encodable, common = transcoded(packed(document))
    assert is_encodable
    assert seen(MSGPACK, MSGPACK.leg((common,), b'{"b":2}')) == document | {"b": 2}


# --- the codecs by name -------------------------------------------------------------------------


def test_orjson_is_json_for_who_sends_it() -> None:
    assert CODECS["orjson"] is CODECS["json"] is JSON


def test_both_say_that_they_are_json_and_msgpack_what_it_really_is() -> None:
    content_type = (b"content-type", b"application/json")
    assert JSON.headers == (content_type,)
    assert MSGPACK.headers == (content_type, (MSGPACK_HEADER.lower().encode(), b"1"))
    assert {codec.name for codec in CODECS.values()} == {"json", "msgpack"}
