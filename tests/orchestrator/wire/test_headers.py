from __future__ import annotations

import pytest

from orchestrator.wire.headers import fields_of, header_block


def test_a_block_holds_a_line_per_field() -> None:
    fields = [(b"x-one", b"1"), (b"two", b""), (b"three", b"a: b")]
    block = header_block(fields)
    assert block == b"x-one: 1\r\ntwo: \r\nthree: a: b\r\n"
    assert fields_of(block) == fields


def test_no_fields_make_an_empty_block() -> None:
    assert header_block([]) == b""
    assert fields_of(b"") == []


@pytest.mark.parametrize(
    "field", [(b"a", b"b\r\nevil: 1"), (b"a\nb", b""), (b"a", b"b\rc"), (b"a\0", b""), (b"a", b"\0")]
)
def test_nothing_can_start_another_line(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="line break or NUL"):
        header_block([(b"fine", b"1"), field])
