"""A request body in msgpack is decoded to what `json.loads` would have given for the same document.

msgpack says in one byte what takes JSON three: an empty map is one byte on the wire and 72 in memory, so a
body of 16 MiB could take over a gigabyte, and seconds of the event loop. These bounds hold, and a document
within them costs no more than msgspec's untyped `decode` (40 us either way for a chat of 234 KB):

- up to `SMALL_BODY` bytes the size is the bound (20 MB of objects at worst): one typed decode;
- above it the document is split into its fields, at most `MAX_FIELDS`. All of them together may have
  `MAX_VALUES` values in lists and maps, by the heads of these, before anything is built; what is neither text
  nor numbers, token ids nor messages may have `MAX_ENTRIES`;
- so n bytes take at most `MAX_VALUES * VALUE_BYTES + MAX_ENTRIES * ENTRY_BYTES + 4 * n` bytes (text with one
  emoji in it has four for each character): 300 MB and the text. What is refused can be sent as JSON;
- nesting ends at `MAX_DEPTH`, as the orchestrator has it for every encoding. The typed decode knows
  `TYPED_DEPTH` levels; what is deeper is walked first.

What JSON cannot say (bytes, extension types, keys that are not strings, NaN and infinities) is refused, with
one exception for those who ask for it: a prompt's token ids in the hand-off may be bytes.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec

from orchestrator.wire.depth import MAX_DEPTH
from worker.token_ids import IDS_KEY, PARAMS_KEY

SMALL_BODY = 256 * 1024
MAX_ENTRIES = 262_144  # at worst 60 MB of objects; a chat of 40,000 messages has as many
MAX_VALUES = 2 * 1024 * 1024  # two prompts of a million tokens; numbers take 40 bytes each, 84 MB
VALUE_BYTES = (
    112  # of a short text that is not Latin, with its place; of a map half of an entry, which is less
)
ENTRY_BYTES = 240  # of a small map
MAX_FIELDS = 4096
MAX_WIDTH = 64  # of a hand-off's fields, and of the lists in one of them
TYPED_DEPTH = 10  # a plain tool's schema reaches 8; the type doubles with every level (20 ms to build at 10)


class BadMsgpack(ValueError):
    """The body is not a document that we take. The text says why and quotes nothing of the body."""


def decode(body: bytes, *, takes_ids: bool = False) -> dict[str, Any]:
    """Decode the document in `body`. Raises `BadMsgpack` and nothing else.

    `takes_ids`: `kv_transfer_params.prompt_token_ids` may be bytes, which stay bytes.
    """
    try:
        return _decode_small(body, takes_ids) if len(body) <= SMALL_BODY else _decode_split(body, takes_ids)
    except RecursionError:
        raise BadMsgpack(_TOO_DEEP) from None
    except UnicodeDecodeError:
        raise BadMsgpack("a string is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        raise BadMsgpack(str(error)) from None


def _decode_small(body: bytes, takes_ids: bool) -> dict[str, Any]:
    try:
        return _TYPED.decode(body)
    except msgspec.ValidationError:  # deeper than the type, or not JSON's: the walk tells which
        return _decode_split(body, takes_ids)


def _decode_split(body: bytes, takes_ids: bool) -> dict[str, Any]:
    """Decode field by field. The split reads all framing and builds nothing: no walk can run off the end."""
    document: dict[str, Any] = {}
    budget = _Budget()
    for key, raw in _SPLIT.decode(body).items():
        ids, rest = _without_ids(raw) if takes_ids and key == PARAMS_KEY else (None, raw)
        document[key] = _decode_field(rest, budget)
        if ids is not None:
            document[key][IDS_KEY] = ids
    return document


def _without_ids(raw: msgspec.Raw) -> tuple[bytes | None, msgspec.Raw]:
    """Take out token ids that are bytes; return them, and the hand-off with none in their place."""
    try:
        params = _SPLIT.decode(raw)
        ids = _BYTES.decode(params[IDS_KEY])
    except (msgspec.ValidationError, KeyError):
        return None, raw
    return ids, msgspec.Raw(msgspec.msgpack.encode(params | {IDS_KEY: None}))


class _Budget:
    """The fields that follow may have so much together."""

    def __init__(self) -> None:
        self.entries = MAX_ENTRIES
        self.values = MAX_VALUES

    def spend_entries(self, count: int) -> None:
        self.entries = _spend(self.entries, count)

    def spend_values(self, count: int) -> None:
        if count > self.values:
            raise BadMsgpack(f"more than {MAX_VALUES} values in lists and maps")
        self.values -= count


def _decode_field(raw: msgspec.Raw, budget: _Budget) -> Any:
    budget.spend_values(_size(raw))
    try:
        return _FLAT.decode(raw)
    except msgspec.ValidationError:
        return _decode_rows(raw, budget)


def _decode_rows(raw: msgspec.Raw, budget: _Budget) -> Any:
    """Decode messages of plain text, or several prompts of token ids: known by type, so only the rows are
    counted.
    """
    try:
        if len(raw) > budget.values:  # only then its rows can have too many values
            budget.spend_values(sum(map(_size, _RAW_ROWS.decode(raw))))
            rows = _ROWS.decode(raw)
        else:
            rows = _ROWS.decode(raw)
            budget.spend_values(sum(map(_length, rows)))
    except msgspec.ValidationError:
        return _decode_narrow(raw, budget)
    budget.spend_entries(len(rows))
    return rows


def _decode_narrow(raw: msgspec.Raw, budget: _Budget) -> Any:
    """Decode a hand-off: it has few fields, and its block ids in a list per KV group, as many as a long
    prompt has.
    """
    try:
        fields = _NARROW.decode(raw) if len(raw) <= budget.values else None
    except msgspec.ValidationError:
        fields = None
    if fields is None:
        budget.entries = _walk(memoryview(raw), budget.entries)
        return _ANY.decode(raw)
    lists = [value for value in fields.values() if isinstance(value, list)]
    budget.spend_entries(len(fields) + sum(map(len, lists)))
    budget.spend_values(sum(_length(group) for groups in lists for group in groups))
    return fields


def _size(raw: msgspec.Raw) -> int:
    """Return how many values a list or map has, as its head says; 0 for anything else."""
    view = memoryview(raw)
    first = view[0]
    if 0x80 <= first < 0xA0 or first in _COUNT_BYTES:
        count = _enter(view, 0)[1]
        return count if count >= 0 else -2 * count
    return 0


def _length(value: object) -> int:
    """Return the same of what was decoded."""
    if isinstance(value, list):
        return len(value)
    return 2 * len(value) if isinstance(value, dict) else 0


def _spend(left: int, entries: int) -> int:
    if entries > left:
        raise BadMsgpack(f"more than {MAX_ENTRIES} entries in nested values")
    return left - entries


# --- the types ------------------------------------------------------------------------------------------

# No comparison holds for NaN, so the bounds refuse it as well as the infinities.
_Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Scalar = None | bool | int | _Finite | str


def _value(levels: int) -> Any:
    """Return the type of a JSON value that nests at most so many containers."""
    if levels == 0:
        return _Scalar
    inner = _value(levels - 1)
    return _Scalar | list[inner] | dict[str, inner]  # type: ignore[valid-type]  # built at run time


_Flat: Any = _Scalar | list[_Scalar] | dict[str, _Scalar]
_Deep: Any = _value(TYPED_DEPTH - 1)
_TYPED: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(dict[str, _Deep])
_SPLIT: msgspec.msgpack.Decoder[dict[str, msgspec.Raw]] = msgspec.msgpack.Decoder(
    Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=MAX_FIELDS)]
)
_BYTES: msgspec.msgpack.Decoder[bytes] = msgspec.msgpack.Decoder(bytes)
_FLAT: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Flat)
_ROWS: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(
    Annotated[list[_Flat], msgspec.Meta(max_length=MAX_ENTRIES)]
)
_RAW_ROWS: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(
    Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_ENTRIES)]
)
_Groups = Annotated[list[_Scalar | list[_Scalar]], msgspec.Meta(max_length=MAX_WIDTH)]
_NARROW: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(
    Annotated[dict[str, _Scalar | _Groups], msgspec.Meta(max_length=MAX_WIDTH)]
)
_ANY: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder()


# --- the walk -------------------------------------------------------------------------------------------

_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_STR_LENGTH_BYTES = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_FLOATS = {0xCA: (4, 0x7F80), 0xCB: (8, 0x7FF0)}  # size, and the exponent bits: all set in what is not finite
_COUNT_BYTES = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def _sizes() -> bytes:
    """Return for each first byte the size of a value that has no length of its own; 0 for all others."""
    sizes = bytearray(256)
    for first in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        sizes[first] = 1
    for first in range(0xA0, 0xC0):
        sizes[first] = 1 + (first & 0x1F)
    for power in range(4):
        sizes[0xCC + power] = sizes[0xD0 + power] = 1 + (1 << power)
    return bytes(sizes)


_SIZES = _sizes()


def _walk(view: memoryview, left: int) -> int:
    """Check the structure of one complete value without building it; returns `left` less its entries.

    Raises `BadMsgpack` for more than `left` entries, more than `MAX_DEPTH` levels, and what JSON cannot say.
    About 0.25 us per entry; a string is one step however long it is.
    """
    position = 0
    waiting = 1  # values still to come in the innermost container; negative in a map, where keys precede them
    outer: list[int] = []
    while waiting or outer:
        if waiting == 0:
            waiting = outer.pop()
            continue
        if waiting > 0:
            waiting -= 1
        else:
            waiting += 1
            key = view[position]
            position = position + _SIZES[key] if 0xA0 <= key < 0xC0 else _after_long_key(view, position)
        first = view[position]
        if size := _SIZES[first]:
            position += size
        elif 0x80 <= first < 0xA0 or first in _COUNT_BYTES:
            outer.append(waiting)
            position, waiting = _enter(view, position)
            left = _spend(left, abs(waiting))
            if len(outer) >= MAX_DEPTH:
                raise BadMsgpack(_TOO_DEEP)
        else:
            position = _after_long_scalar(view, position)
    return left


def _enter(view: memoryview, position: int) -> tuple[int, int]:
    """Return where a container's first entry begins, and how many there are: negative for a map."""
    first = view[position]
    start = position + 1
    if first < 0xA0:
        return start, first & 0xF if first >= 0x90 else -(first & 0xF)
    end = start + _COUNT_BYTES[first]
    count = int.from_bytes(view[start:end])
    return end, count if first < 0xDE else -count


def _after_long_key(view: memoryview, position: int) -> int:
    if view[position] not in _STR_LENGTH_BYTES:
        raise BadMsgpack("a key is not a string")
    return _after_long_scalar(view, position)


def _after_long_scalar(view: memoryview, position: int) -> int:
    """Return the end of a float, or of a string with its length in front. Raises for all that is not JSON."""
    first = view[position]
    start = position + 1
    if first in _STR_LENGTH_BYTES:
        text = start + _STR_LENGTH_BYTES[first]
        return text + int.from_bytes(view[start:text])
    if first not in _FLOATS:
        raise BadMsgpack("bytes and extension types cannot be part of a JSON document")
    size, exponent = _FLOATS[first]
    if int.from_bytes(view[start : start + 2]) & exponent == exponent:
        raise BadMsgpack("a number is not finite")
    return start + size
