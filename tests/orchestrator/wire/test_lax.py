"""The table of lax values, beside pydantic, whose it is."""

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from msgspec import Raw
from pydantic import TypeAdapter, ValidationError

from orchestrator.wire.lax import lax_bool, lax_int

_INT, _BOOL = TypeAdapter(int), TypeAdapter(bool)
_NUMBERS = (
    st.integers()
    | st.floats()
    | st.integers(-(2**70), 2**70).map(float)
    | st.sampled_from([2.0**63, -(2.0**63), 0.0, -0.0, 1.0, 1e308, 10**30, 2**63, 2**64])
)
_DIGITS = st.text(st.sampled_from("0123456789_+-. \t\n\x0b\x1c\x85\xa0\u2003\u200b\u3000e\u0665"), max_size=8)
_LONG = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "0", "-", "+"]),
    st.sampled_from(["1" * 4299, "1" * 4301]),
    st.sampled_from(["", ".0", "0"]),
)
_WORDS = st.sampled_from(
    ["0", "1", "on", "off", "t", "f", "true", "false", "y", "n", "yes", "no", "oﬀ", "K", "2", ""]
)
_CASED = st.builds(
    lambda word, spell: spell(word), _WORDS, st.sampled_from([str, str.upper, str.title, " {}".format])
)
_OTHERS = st.none() | st.booleans() | st.lists(st.integers(), max_size=2) | st.just({})
_VALUES = _NUMBERS | _DIGITS | _LONG | _CASED | _OTHERS | st.text(max_size=4)


# pydantic strips leading zeros before it looks for a sign: `0-5` is -5 to it. Nobody means that.
_SECOND_SIGN = re.compile(r"\s*[+-]?0[0_]*(-|__)")


def _pydantic(adapter: TypeAdapter[object], document: str) -> object:
    """Return what pydantic makes of it, as vLLM reads it: as Python's `json` has read it."""
    try:
        return adapter.validate_python(json.loads(document))
    except (ValidationError, ValueError):
        return None


def _ours(read: Callable[[Raw], object], document: str) -> object:
    try:
        return read(Raw(document.encode()))
    except ValueError:
        return None


def _is_same(left: object, right: object) -> bool:
    return type(left) is type(right) and left == right


@given(value=_VALUES)
@example(value="1_000.0")
@example(value="0" * 5000 + "1")
@example(value=-(2.0**63))
def test_every_value_means_what_pydantic_says(value: object) -> None:
    assume(not (isinstance(value, str) and _SECOND_SIGN.match(value)))
    document = json.dumps(value)
    assert _is_same(_ours(lax_int, document), _pydantic(_INT, document))
    assert _is_same(_ours(lax_bool, document), _pydantic(_BOOL, document))


@pytest.mark.parametrize(
    "document",
    [
        "1e1",
        "7.0",
        "100.0",
        "1E+2",
        "0.0",
        "-0",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "1.5e0",
        "1" * 30,
        "1" * 4301,
    ],
)
def test_every_spelling_of_a_number_means_what_pydantic_says(document: str) -> None:
    assert _is_same(_ours(lax_int, document), _pydantic(_INT, document))
    assert _is_same(_ours(lax_bool, document), _pydantic(_BOOL, document))


@pytest.mark.parametrize("text", ["0-0", "00-5", "0__5", "0-5.0"])
def test_what_only_looks_like_a_number_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected an integer"):
        lax_int(Raw(json.dumps(text).encode()))


def test_a_refusal_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected an integer, got an array"):
        lax_int(Raw(b"[]"))
    with pytest.raises(ValueError, match="expected a boolean, got a string"):
        lax_bool(Raw(b'"maybe"'))
