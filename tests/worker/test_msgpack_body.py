from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.depth import MAX_DEPTH
from tests.orchestrator.wire.documents import keys, values
from tests.worker.hostile import BAD_BODIES, array, field, nested
from worker import msgpack_body
from worker.msgpack_body import (
    ENTRY_BYTES,
    MAX_ENTRIES,
    MAX_VALUES,
    MAX_WIDTH,
    SMALL_BODY,
    VALUE_BYTES,
    BadMsgpack,
    decode,
)

encode = msgspec.msgpack.encode
documents = st.dictionaries(keys, values, max_size=6)


def exactly(document: Any) -> str:
    """Tells 1, 1.0 and true apart, and 0.0 and -0.0."""
    return json.dumps(document)


@given(documents)
def test_decodes_what_json_would_have_given(document: dict[str, Any]) -> None:
    assert exactly(decode(encode(document))) == exactly(document)


@given(documents)
def test_a_large_body_is_decoded_like_a_small_one(document: dict[str, Any]) -> None:
    with mock.patch.object(msgpack_body, "SMALL_BODY", 0):
        assert exactly(decode(encode(document))) == exactly(document)


@given(documents, st.data())
def test_a_cut_body_is_refused(document: dict[str, Any], data: st.DataObject) -> None:
    body = encode(document)
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    with pytest.raises(BadMsgpack):
        decode(cut)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_to_a_document_or_are_refused(body: bytes, is_large: bool) -> None:
    with mock.patch.object(msgpack_body, "SMALL_BODY", 0 if is_large else SMALL_BODY):
        outcome(body)


@given(documents, st.data())
def test_a_damaged_body_decodes_to_a_document_or_is_refused(
    document: dict[str, Any], data: st.DataObject
) -> None:
    body = bytearray(encode(document))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    small = outcome(bytes(body))
    with mock.patch.object(msgpack_body, "SMALL_BODY", 0):
        assert outcome(bytes(body)) == small


def outcome(body: bytes) -> str | None:
    try:
        return json.dumps(decode(body), allow_nan=False)
    except BadMsgpack:
        return None


@pytest.mark.parametrize("name", BAD_BODIES)
def test_hostile_bodies_are_refused(name: str) -> None:
    with pytest.raises(BadMsgpack):
        decode(BAD_BODIES[name]())


@pytest.mark.parametrize("wrap", [b"\x91", b"\x81\xa0"], ids=["array", "map"])
def test_nesting_ends_at_the_limit(wrap: bytes) -> None:
    assert decode(nested(MAX_DEPTH, wrap))
    with pytest.raises(BadMsgpack, match="levels deep"):
        decode(nested(MAX_DEPTH + 1, wrap))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(list(range(MAX_ENTRIES + 1)), id="token ids"),
        pytest.param([[1, 2], list(range(MAX_ENTRIES + 1))], id="several prompts"),
        pytest.param([{"role": "user", "content": "x" * 100}] * 5000, id="messages"),
        pytest.param([{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}] * 1000, id="parts"),
        pytest.param({f"k{i}": i / 7 for i in range(40_000)}, id="a wide map"),
        pytest.param(
            {"engine": "e", "port": 1, "blocks": [list(range(MAX_ENTRIES + 1)), []]}, id="a hand-off"
        ),
        pytest.param("x" * SMALL_BODY, id="text"),
        pytest.param({"a" * 300: {"b" * 70_000: ["c" * 200_000, 0.5, 2**63, -1, None]}}, id="long keys"),
    ],
)
def test_large_documents_that_are_no_bombs_pass(value: Any) -> None:
    document = {"model": "m", "value": value, "tools": [{"a": {"b": [{}]}}]}
    body = encode(document)
    assert len(body) > SMALL_BODY
    assert decode(body) == document


def test_entries_are_counted_over_all_fields() -> None:
    field = [[]] * (MAX_ENTRIES // 2)
    assert decode(encode({"a": field, "b": field}))
    with pytest.raises(BadMsgpack, match="entries"):
        decode(encode({"a": field, "b": field, "c": [[]]}))


def test_lists_of_numbers_are_bounded_too() -> None:
    """In msgpack a number may be a single byte, of which 16 MiB would take 600 MB."""
    numbers = b"\x81\xa1a\xdd%b" + b"\xf0" * MAX_VALUES
    assert len(decode(numbers.replace(b"%b", struct.pack(">I", MAX_VALUES)))["a"]) == MAX_VALUES
    with pytest.raises(BadMsgpack, match="values"):
        decode(numbers.replace(b"%b", struct.pack(">I", MAX_VALUES + 1)) + b"\xf0")


def test_entries_of_handoffs_are_counted_too() -> None:
    field = {"blocks": [[]] * MAX_WIDTH}
    many = MAX_ENTRIES // (MAX_WIDTH + 1)
    with mock.patch.object(msgpack_body, "SMALL_BODY", 0):
        assert decode(encode({str(number): field for number in range(many)}))
        with pytest.raises(BadMsgpack, match="entries"):
            decode(encode({str(number): field for number in range(many + 1)}))


def dear(kind: str, count: int) -> bytes:
    match kind:
        case "small negative numbers":
            return array(count, b"\xe0" * count)
        case "numbers":
            return array(count, b"\xd0\x80" * count)
        case "floats":
            return array(count, b"\xca\x3e\xaa\xaa\xab" * count)
        case "emoji":
            return array(count, b"\xa4\xf0\x9f\x98\x80" * count)
        case "Latin":
            return array(count, b"\xa2ab" * count)
        case _:
            pairs = (b"\xa9\xf0\x9f\x98\x80%05x\xa4\xf0\x9f\x98\x80" % number for number in range(count // 2))
            return b"\xdf" + (count // 2).to_bytes(4, "big") + b"".join(pairs)


KINDS = ["small negative numbers", "numbers", "floats", "emoji", "Latin", "map"]
FEW = 8000  # values, as `MAX_VALUES` in these tests


@pytest.mark.parametrize("shape", ["one list", "fields", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_below_what_is_stated(kind: str, shape: str) -> None:
    """The bound is reached from below, and what goes beyond it is refused before it is built."""

    def body(values: int) -> bytes:
        if shape == "one list":
            return field(dear(kind, values))
        if shape == "fields":
            return b"\x84" + b"".join(
                b"\xa1%b" % name + dear(kind, values // 4) for name in (b"a", b"b", b"c", b"d")
            )
        return field(array(4, dear(kind, values // 4) * 4))

    def peak(values: int) -> int:
        made = body(values)
        tracemalloc.start()
        with contextlib.suppress(BadMsgpack):
            decode(made)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    rest = 4 * ENTRY_BYTES + 4096
    with mock.patch.object(msgpack_body, "MAX_VALUES", FEW), mock.patch.object(msgpack_body, "SMALL_BODY", 0):
        assert decode(body(FEW - 8))
        stated = FEW * VALUE_BYTES + rest
        assert peak(FEW - 8) <= stated + 4 * len(body(FEW - 8))
        with pytest.raises(BadMsgpack, match="values"):
            decode(body(FEW + 8))
        assert peak(100 * FEW) <= stated + 2 * len(body(100 * FEW))


def test_two_prompts_of_a_million_tokens_pass() -> None:
    ids = b"\xcd\x11\x11" * 1_000_000
    prompts = field(array(2, array(1_000_000, ids) * 2))
    assert [len(prompt) for prompt in decode(prompts)["a"]] == [1_000_000] * 2


def test_single_precision_floats_are_taken() -> None:
    half = b"\xca" + struct.pack(">f", 0.5)
    assert decode(b"\x81\xa1a" + half) == {"a": 0.5}
    assert decode(nested(20, b"\x91", half))


def test_the_last_of_equal_keys_wins_as_in_json() -> None:
    assert decode(b"\x82\xa1a\x01\xa1a\x02") == json.loads('{"a": 1, "a": 2}')


def test_a_refusal_quotes_nothing_of_the_body() -> None:
    for body in (encode({"secret": [b"secret"]}), b"\x81\xa6secret", b"\x81\xa6secre\xff\x01"):
        with pytest.raises(BadMsgpack) as refusal:
            decode(body)
        assert "secre" not in str(refusal.value)


# --- token ids that are bytes ---------------------------------------------------------------------------

PARAMS = {"remote_block_ids": [[1, 2]], "prompt_token_ids": None, "remote_port": 1}


def leg(ids: object, **fields: Any) -> dict[str, Any]:
    return {"model": "m"} | fields | {"kv_transfer_params": PARAMS | {"prompt_token_ids": ids}}


@pytest.mark.parametrize("size", [0, 8, SMALL_BODY])
def test_ids_in_the_handoff_may_be_bytes(size: int) -> None:
    document = leg(b"\x01\xff" * (size // 2), tools=[{"a": [{}]}])
    assert decode(encode(document), takes_ids=True) == document
    with pytest.raises(BadMsgpack, match="bytes"):
        decode(encode(document))


@pytest.mark.parametrize(
    "document",
    [
        leg([b"ids"]),
        leg({"prompt_token_ids": b"ids"}),
        leg(b"ids", prompt_token_ids=b"ids"),
        leg(b"ids", kv=[b"ids"]),
        leg(b"ids") | {"kv_transfer_params": {"other": b"ids"}},
        leg(b"ids") | {"kv_transfer_params": {"other": b"ids", "prompt_token_ids": b"ids"}},
        leg(b"ids") | {"kv_transfer_params": b"ids"},
        leg(b"ids") | {"kv_transfer_params": [{"prompt_token_ids": b"ids"}]},
    ],
)
def test_bytes_at_any_other_place_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(BadMsgpack, match="bytes"):
        decode(encode(document), takes_ids=True)


@given(documents, st.booleans())
def test_who_takes_ids_decodes_all_else_as_before(document: dict[str, Any], is_large: bool) -> None:
    with mock.patch.object(msgpack_body, "SMALL_BODY", 0 if is_large else SMALL_BODY):
        for body in (document, leg([1, 2]) | document, leg("text"), {"kv_transfer_params": document}):
            assert exactly(decode(encode(body), takes_ids=True)) == exactly(body)


@pytest.mark.parametrize("name", [name for name in BAD_BODIES if "top level" not in name])
def test_a_handoff_of_any_shape_is_bounded_as_before(name: str) -> None:
    body = b"\x81" + encode("kv_transfer_params") + BAD_BODIES[name]()
    with pytest.raises(BadMsgpack):
        decode(body, takes_ids=True)


def test_a_handoff_with_bytes_nests_no_deeper() -> None:
    def deep(levels: int) -> bytes:
        inner: Any = None
        for _ in range(levels - 2):
            inner = [inner]
        return encode({"kv_transfer_params": {"prompt_token_ids": b"ids", "deep": inner}})

    assert decode(deep(MAX_DEPTH), takes_ids=True)
    with pytest.raises(BadMsgpack, match="levels deep"):
        decode(deep(MAX_DEPTH + 1), takes_ids=True)
