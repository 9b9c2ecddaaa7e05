from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.forms import MAX_FIELDS, InvalidForm, text_fields

TYPE = b"multipart/form-data; boundary=b0"


def form(*fields: tuple[str, bytes, str], boundary: bytes = b"b0") -> bytes:
    """Of name, value, and more of the disposition."""
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        % (boundary, name.encode(), more.encode(), value)
        for name, value, more in fields
    ]
    return b"".join(parts) + b"--%b--\r\n" % boundary


def values(body: bytes, *names: str, content_type: bytes = TYPE) -> dict[str, bytes]:
    found = text_fields(body, content_type, names)
    return {name: body[span.start : span.end] for name, span in found.items()}


def test_fields_are_found_by_their_place() -> None:
    body = form(("file", b"\r\n--b\r\n", '; filename="a.wav"'), ("model", b"m", ""), ("stream", b"true", ""))
    assert values(body, "model", "stream", "other") == {"model": b"m", "stream": b"true"}


def test_an_empty_value_has_a_place_too() -> None:
    assert values(form(("model", b"", "")), "model") == {"model": b""}


def test_a_file_is_no_text_field() -> None:
    assert values(form(("model", b"m", '; filename="model"')), "model") == {}


@pytest.mark.parametrize(
    "content_type",
    [b'Multipart/Form-Data; charset=utf-8; boundary="b0"', b"multipart/form-data;boundary=b0"],
)
def test_the_boundary_may_be_told_in_other_ways(content_type: bytes) -> None:
    assert values(form(("model", b"m", "")), "model", content_type=content_type) == {"model": b"m"}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(("model", b"m", "")), b"multipart/form-data"),
        (form(("model", b"m", "")), b"application/json; boundary=b0"),
        (form(("model", b"m", "")), b"multipart/form-data; boundary=other"),
        (form(("model", b"m", ""))[:-6], TYPE),
        (b"", TYPE),
        (b"\x00" * 100, TYPE),
        (form(("model", b"m", ""), ("model", b"n", "")), TYPE),
        (form(*[("a", b"", "")] * (MAX_FIELDS + 1)), TYPE),
        (b"--b0\r\nbroken header\r\n\r\n\r\n--b0--", TYPE),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, content_type: bytes) -> None:
    with pytest.raises(InvalidForm):
        text_fields(body, content_type, ["model"])


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_nothing_else_is_raised(body: bytes, content_type: bytes) -> None:
    try:
        text_fields(body, content_type, ["model"])
        text_fields(b"--b0" + body, TYPE, ["model"])
    except InvalidForm:
        pass


@given(st.binary(max_size=300), st.text("abcm", max_size=8))
def test_what_is_in_a_file_changes_nothing(content: bytes, model: str) -> None:
    if b"--b0" in content:
        return
    body = form(("file", content, '; filename="f"'), ("model", model.encode(), ""))
    assert values(body, "model") == {"model": model.encode()}
