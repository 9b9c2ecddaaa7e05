"""The depth of documents, judged by structure, at a cost that no document can drive up."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from orchestrator.wire import depth
from orchestrator.wire.depth import MAX_DEPTH, MAX_SCANNED, TOO_DEEP, TOO_MANY, nesting_fault, scanned

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_TEXTS = st.text(st.sampled_from('[]{}"\\n, é'), max_size=6)
_SCALARS = st.none() | st.booleans() | st.integers() | _TEXTS
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=40,
)


def _depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth_of, value.values()), default=0)
    return 1 + max(map(_depth_of, value), default=0) if isinstance(value, list) else 0


def _count_in(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_count_in, value.values()))
    return 1 + sum(map(_count_in, value)) if isinstance(value, list) else 0


def _judged(body: bytes) -> bool:
    return nesting_fault(body, _FIELDS.decode(body)) is not None


def _nested(levels: int, *, blank: str = "", opened: str = "[", closed: str = "]", core: str = "") -> str:
    """Return a value of so many levels."""
    return (opened + blank) * levels + core + (blank + closed) * levels


@given(value=_VALUES, indent=st.none() | st.integers(0, 3))
def test_a_scan_finds_the_depth_whatever_strings_hold(value: object, indent: int | None) -> None:
    document = json.dumps(value, indent=indent).encode()
    assert scanned(document, 10_000, 10_000) == (_depth_of(value), _count_in(value))


@given(value=_VALUES, block=st.integers(1, 40))
def test_a_scan_goes_on_from_block_to_block(value: object, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "_BLOCK", block)
        assert scanned(json.dumps(value).encode(), 10_000, 10_000)[0] == _depth_of(value)


@given(
    value=_VALUES,
    extra=st.integers(-12, 12),
    blank=st.sampled_from(["", " ", "\n" * 70]),
    is_object=st.booleans(),
    place=st.sampled_from(
        ["{0}", '[{{"content":{0}}}]', '[{{"a":"\\n"}},{{"content":[{{"x":{0}}}]}}]', '["\\"[",{0}]']
    ),
)
def test_a_document_is_too_deep_from_one_level_on(
    value: object, extra: int, blank: str, is_object: bool, place: str
) -> None:
    opened, closed = ('{"[":', "}") if is_object else ("[", "]")
    nested = _nested(MAX_DEPTH + extra, blank=blank, opened=opened, closed=closed, core=json.dumps(value))
    body = b'{"messages":%b}' % place.format(nested).encode()
    assert _judged(body) is (_depth_of(json.loads(body)) > MAX_DEPTH)


@pytest.mark.parametrize("text", ["[", "{", '\\"[{', "\\\\", "[]" * 9])
def test_brackets_in_text_do_not_nest(text: str) -> None:
    body = b'{"messages":[{"content":"%b"}]}' % (text * 20_000).encode()
    assert not _judged(body)


def test_the_limit_is_the_same_at_every_size() -> None:
    for filling in ("", "x" * 10_000, "\\n[" * 10_000, "{" * 2_000_000):
        for levels, is_refused in ((MAX_DEPTH - 1, False), (MAX_DEPTH, True)):
            body = f'{{"text":"{filling}","a":{_nested(levels)}}}'.encode()
            assert _judged(body) is is_refused, (len(filling), levels)


@pytest.mark.parametrize("fields", [1, 4])
def test_there_may_be_so_many_objects_and_lists(fields: int) -> None:
    for more, fault in ((0, None), (1, TOO_MANY)):
        each = "[" + "[]," * (MAX_SCANNED // fields - 1 + more) + "1]"
        body = ("{" + ",".join(f'"f{number}":{each}' for number in range(fields)) + "}").encode()
        assert nesting_fault(body, _FIELDS.decode(body)) == fault


def test_what_is_too_deep_is_not_too_many() -> None:
    body = f'{{"a":{_nested(MAX_DEPTH)}}}'.encode()
    assert nesting_fault(body, _FIELDS.decode(body)) == TOO_DEEP


_MIB = 1024 * 1024
_HOSTILE = {
    "lists": b'{"a":[' + b"[]," * _MIB + b"1]}",
    "teeth": b'{"a":[' + (_nested(125) + ",").encode() * (3 * _MIB // 251) + b"1]}",
    "text at the bottom": b'{"a":' + _nested(126, core='"' + "[" * 3 * _MIB + '"').encode() + b"}",
    "strings": b'{"a":[' + b'"",' * _MIB + b"[" * 120 + b"{}" + b"]" * 120 + b"]}",
    "escapes": b'{"a":[' + b"[]," * 300 + b'"' + b'\\"[' * _MIB + b'"]}',
    "rows in rows": b'{"a":[{"b":[{"c":[' + b'{"d":"\\n["},' * 80_000 + b"1]}]}]}",
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_no_document_is_looked_at_again_and_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look takes time in proportion to the bytes; so all of them do, if no byte is looked at often."""
    body, looked_at = _HOSTILE[name], 0
    fields = _FIELDS.decode(body)
    for look in ("_may_nest", "_rows", "scanned"):
        original = getattr(depth, look)

        def counting(value: bytes, *levels: int, original: Callable[..., Any] = original) -> Any:
            nonlocal looked_at
            looked_at += len(value)
            return original(value, *levels)

        monkeypatch.setattr(depth, look, counting)
    assert nesting_fault(body, fields) in (None, TOO_MANY)
    assert looked_at < 8 * len(body)
