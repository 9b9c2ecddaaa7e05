"""A document may nest only so deep: one limit for every codec, endpoint and engine.

A document nests one level deeper with each object or list inside another; itself it is level 1. Parsers end
somewhere: Python 3.11's own at about 950 levels, less what stands on the stack already, pydantic's writer at
255. Who is given a document that another one has taken must not fail on it, so all that comes in is measured.

Brackets in strings do not nest, but they are found faster than told apart. A body with few brackets is
shallow, whatever they are. Others are scanned; but where there are escapes, which makes that slow, lists of
objects are opened first, as messages and tools are: text in them is then known for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate, chain
from operator import add
from typing import Final

import msgspec
from msgspec import Raw

# As deep as serde_json goes, and half as deep as pydantic writes. The JSON Schemas of tools reach about 20.
MAX_DEPTH: Final = 128

# A document of so many bytes or fewer has no room for more levels.
SHALLOW_BYTES: Final = 2 * MAX_DEPTH

# Objects and lists in a document that is scanned: 10 ms. A chat of 40,000 messages in parts has 120,000.
MAX_SCANNED: Final = 500_000

_COUNTED_BYTES: Final = 8192  # up to here counting all brackets costs less than finding one after the other
_MOST_OPENED_BYTES: Final = 1024 * 1024  # as objects, what is in them takes 25 MB at worst
_ROWS_DEEP: Final = 2  # lists that are opened in each other: messages, and the parts of one
_BLOCK: Final = 64 * 1024  # bytes that are scanned at once: they take 2 MB at worst

_ROWS: Final = msgspec.json.Decoder(list[dict[str, Raw]])
_values: Final = dict.values


TOO_DEEP: Final = f"nested more than {MAX_DEPTH} levels deep"
TOO_MANY: Final = f"nested from more than {MAX_SCANNED} objects and lists"


def nesting_fault(body: bytes, fields: Mapping[str, Raw]) -> str | None:
    """Return `TOO_DEEP` or `TOO_MANY` if a JSON object is that; `fields` are its values. It is valid JSON.

    This takes time in proportion to the size, whatever is in the document.
    """
    if not _may_nest(body, MAX_DEPTH):
        return None
    return _Look().at(fields.values(), MAX_DEPTH - 1, _ROWS_DEEP)


def _may_nest(value: bytes, levels: int) -> bool:
    """Tell whether the value has room and brackets for more levels than that."""
    if len(value) <= 2 * levels:
        return False
    if len(value) <= _COUNTED_BYTES:
        return value.count(b"[") + value.count(b"{") > levels
    return _count(value, b"{", _count(value, b"[", levels)) < 0


def _count(value: bytes, bracket: bytes, left: int) -> int:
    """Return `left` less the number of such brackets; not less than -1."""
    at = value.find(bracket)
    while at >= 0 and left >= 0:
        left -= 1
        at = value.find(bracket, at + 1)
    return left


class _Look:
    """One document is looked at."""

    def __init__(self) -> None:
        self._left = MAX_SCANNED

    def at(self, values: Iterable[Raw], levels: int, rows_deep: int) -> str | None:
        """Return what is wrong with the first of the values that has more than so many levels, or too many
        objects and lists.
        """
        least = 2 * levels
        for raw in [raw for raw in values if len(raw) > least]:
            fault = self._at_one(bytes(raw), levels, rows_deep)
            if fault is not None:
                return fault
        return None

    def _at_one(self, value: bytes, levels: int, rows_deep: int) -> str | None:
        if value[:1] not in (b"[", b"{") or not _may_nest(value, levels):
            return None
        rows = _rows(value) if rows_deep else None
        if rows is not None:
            return self.at(chain.from_iterable(map(_values, rows)), levels - 2, rows_deep - 1)
        depth, count = scanned(value, levels, self._left)
        self._left -= count
        if self._left < 0:
            return TOO_MANY
        return TOO_DEEP if depth > levels else None


def _rows(value: bytes) -> list[dict[str, Raw]] | None:
    """Return the objects in a list of objects; None for anything else, for what is too much at once, and for
    what is scanned in less time, as there are no escapes in it.
    """
    if len(value) > _MOST_OPENED_BYTES or value[:1] != b"[" or b"\\" not in value:
        return None
    try:
        return _ROWS.decode(value)
    except msgspec.DecodeError:
        return None


# --- a scan of the brackets ---------------------------------------------------------------------

_FOLD: Final = bytes.maketrans(b"[{]}", b"1100")
_PLAIN: Final = bytes(set(range(256)) - set(b'[]{}"'))


def scanned(value: bytes, most: int, most_opened: int) -> tuple[int, int]:
    """Return how many levels a valid JSON value has, and how many objects and lists.

    The scan ends early, with what was found by then, where there are more than `most` levels, or more than
    `most_opened` objects and lists.
    """
    if b"\\" in value:  # what is behind a backslash ends no string
        value = value.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = deepest = count = in_string = 0
    for start in range(0, len(value), _BLOCK):
        marks = value[start : start + _BLOCK].translate(_FOLD, _PLAIN)
        pieces = marks.replace(b'""', b"").split(b'"')  # two quotes more or less change no string's inside
        brackets = b"".join(pieces[in_string::2])
        in_string ^= (len(pieces) - 1) & 1
        opened = brackets.count(b"1")
        count += opened
        if depth + opened > deepest:
            deepest = max(deepest, depth + _peak(brackets))
        if deepest > most or count > most_opened:
            break
        depth += 2 * opened - len(brackets)
    return deepest, count


def _net_of(byte: int) -> int:
    return 2 * byte.bit_count() - 8


def _peak_of(byte: int) -> int:
    """Return the highest level inside eight brackets, above that before them."""
    return max(accumulate((1 if byte & (128 >> at) else -1 for at in range(8)), initial=0))


_NET: Final[list[int]] = [_net_of(byte) for byte in range(256)]
_PEAK: Final[list[int]] = [_peak_of(byte) for byte in range(256)]


def _peak(brackets: bytes) -> int:
    """Return the highest level in a row of brackets (1 opens, 0 closes), above that before them.

    Eight are looked up at once: a step each would take longer than it took to parse them.
    """
    if not brackets:
        return 0
    padded = brackets + b"0" * (-len(brackets) % 8)
    eights = int(padded, 2).to_bytes(len(padded) // 8)
    starts = accumulate(map(_NET.__getitem__, eights), initial=0)
    highest: int = max(map(add, starts, map(_PEAK.__getitem__, eights)))
    return highest
