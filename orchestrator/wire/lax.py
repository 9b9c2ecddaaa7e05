"""Numbers and switches are taken in all the spellings that vLLM takes, which are pydantic's lax ones.

| type | what is taken | and what it means |
|---|---|---|
| integer | an integer, of at most 4300 digits | itself |
| | `true`, `false` | 1, 0 |
| | a number without fraction, inside 64 bits: `100.0`, `1e1` | that integer |
| | a string of decimal digits, with blanks around, a sign, `_` between two, `.0` behind | that integer |
| switch | `true`, `false` | itself |
| | 1, 0, 1.0, 0.0 | true, false |
| | `1`, `on`, `t`, `true`, `y`, `yes` as a string in any case | true |
| | `0`, `off`, `f`, `false`, `n`, `no` as a string in any case | false |

Whoever routes by a field has to read what its worker reads. `null` is for the caller to deal with.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Raw

_INTEGER: Final = re.compile(r"([+-]?)([0-9]+(?:_[0-9]+)*)(?:\.0+)?", re.ASCII)
# pydantic is written in Rust, whose blanks are Unicode's: not the four separators that Python counts, too.
_BLANKS: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_MOST_DIGITS: Final = 4300
_SWITCHES: Final = dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True) | dict.fromkeys(
    ("0", "off", "f", "false", "n", "no"), False
)


def lax_int(raw: Raw | bytes) -> int:
    """Return the integer that a JSON value means. Raises `ValueError` if it means none, `null` included."""
    return int_of(_decoded(raw, "an integer"))


def lax_bool(raw: Raw | bytes) -> bool:
    """Return the switch that a JSON value means. Raises `ValueError` if it means none, `null` included."""
    return bool_of(_decoded(raw, "a boolean"))


def int_of(value: object) -> int:
    """Do as `lax_int`, for what was decoded already."""
    if isinstance(value, int):  # true and false, too
        return int(value)
    if isinstance(value, float) and value.is_integer() and -(2.0**63) < value < 2.0**63:
        return int(value)
    if isinstance(value, str):
        return _int_in(value)
    raise ValueError(f"expected an integer, got {_kind(value)}")


def bool_of(value: object) -> bool:
    """Do as `lax_bool`, for what was decoded already."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.isascii() and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    raise ValueError(f"expected a boolean, got {_kind(value)}")


def _decoded(raw: Raw | bytes, wanted: str) -> object:
    try:
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:  # out of range, or NaN
        raise ValueError(f"expected {wanted}: {error}") from error
    return value


def _int_in(text: str) -> int:
    found = _INTEGER.fullmatch(text.strip(_BLANKS))
    if found is None:
        raise ValueError("expected an integer, got a string that is none")
    digits = found[2].replace("_", "").lstrip("0") or "0"
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected an integer of at most {_MOST_DIGITS} digits")
    return int(found[1] + digits)


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", dict: "an object", list: "an array", str: "a string", type(None): "null"}
    return kinds.get(type(value), "a number that is none")
