from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from orchestrator.wire.forms import (
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_VALUE_BYTES,
    FormScanner,
    InvalidForm,
    Value,
    text_fields,
)

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


# --- as it comes ----------------------------------------------------------------------------------

NAMES = ["model", "stream"]


def scanned(body: bytes, cuts: list[int]) -> tuple[bytes, dict[str, bytes], int]:
    """What a scanner returns of a whole form that comes in pieces: its bytes, the values, and the most bytes
    that were with the scanner at a time.
    """
    scanner, out, held = FormScanner(TYPE, NAMES), [], 0
    at = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in pairwise(at):
        out += scanner.feed(body[start:end])
        held = max(held, end - sum(map(size, out)))
    scanner.finish()
    given = [piece.content if isinstance(piece, Value) else bytes(piece) for piece in out]
    assert {piece.name: piece.content for piece in out if isinstance(piece, Value)} == scanner.found
    return b"".join(given), scanner.found, held


def size(piece: Any) -> int:
    return len(piece.content if isinstance(piece, Value) else piece)


def as_workers_read(body: bytes) -> list[tuple[bytes, bool, bytes]]:
    """The fields of a form as vLLM's parser finds them: name, whether it is a file, and value."""
    found: list[list[Any]] = []
    field = [b"", b""]

    def begin() -> None:
        found.append([b"", False, b""])

    def add(place: int, data: bytes) -> None:
        field[place] += data

    def end_header() -> None:
        if field[0].lower() == b"content-disposition":
            options = parse_options_header(field[1])[1]
            found[-1][:2] = options[b"name"], b"filename" in options
        field[:] = [b"", b""]

    def add_value(data: bytes) -> None:
        found[-1][2] += data

    parser = MultipartParser(
        b"b0",
        {
            "on_part_begin": begin,
            "on_header_field": lambda data, start, end: add(0, data[start:end]),
            "on_header_value": lambda data, start, end: add(1, data[start:end]),
            "on_header_end": end_header,
            "on_part_data": lambda data, start, end: add_value(data[start:end]),
        },
    )
    parser.write(body)
    parser.finalize()
    return [(name, is_file, value) for name, is_file, value in found]


_cuts = st.lists(st.integers(0, 10_000), max_size=12)
_dispositions = st.sampled_from(
    [
        "",
        '; filename="a"',
        '; filename="a; name=\\"b\\""',
        "; filename=x",
        '; x="; name=y"',
        "; filename*=UTF-8''a",
    ]
)
_fields_of_forms = st.lists(
    st.tuples(
        st.sampled_from(["model", "stream", "file", "mod", 'a\\"b']),
        st.binary(max_size=40) | st.sampled_from([b"\r", b"\r\n", b"\r\n--", b"\r\n--b", b"\r\n--b1", b""]),
        _dispositions,
    ),
    max_size=5,
)


@given(_fields_of_forms, _cuts)
@example([("model", b"m", "")], list(range(200)))
@example([("file", b"\r\n--b\r\n--b", "; filename=x"), ("model", b"\r\n--b", "")], list(range(300)))
def test_a_form_comes_out_as_it_came_in(fields: list[tuple[str, bytes, str]], cuts: list[int]) -> None:
    body = form(*fields)
    try:
        out, found, held = scanned(body, cuts)
    except InvalidForm:
        names = [name for name, _, _ in fields]
        is_clear = len({*names}) == len(names) and not any("*" in more for _, _, more in fields)
        assert not is_clear or any(b"--b0" in value for _, value, _ in fields)
        return
    assert out == body
    assert held <= MAX_HEAD_BYTES
    text = {name.decode(): value for name, is_file, value in as_workers_read(body) if not is_file}
    assert found == {name: value for name, value in text.items() if name in NAMES}


_PARTS_OF_HEADS = (
    b'Content-Disposition: form-data; name="model" ; name=stream ; filename="f" ; name*=u\'\'model'.split(
        b" "
    )
)
_MARKS = b'--b0 b0 -- : " ; = \\ \x00 m content-type:'.split(b" ")
_bits = st.sampled_from(
    [
        b'; name="model"',
        *_PARTS_OF_HEADS,
        *_MARKS,
        b" ",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\r\n--b0",
        b"--b0--\r\n",
    ]
)


@given(st.lists(_bits, max_size=25).map(b"".join), _cuts, st.booleans())
def test_what_is_taken_is_understood_as_workers_do(bits: bytes, cuts: list[int], begins: bool) -> None:
    """Whatever somebody makes up: it is refused, or no reader finds more in it than was seen here."""
    body = b'--b0\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + bits if begins else bits
    try:
        out, found, _ = scanned(body, cuts)
    except InvalidForm:
        return
    assert out == body
    assert scanned(body, []) == (out, found, 0) or scanned(body, [])[:2] == (out, found)
    try:
        fields = as_workers_read(body)
    except FormParserError:
        return
    text = {name.decode("utf-8", "replace"): value for name, is_file, value in fields if not is_file}
    assert found == {name: value for name, value in text.items() if name in NAMES}


def test_a_large_file_passes_without_being_held() -> None:
    scanner = FormScanner(TYPE, NAMES)
    begins = form(("file", b"", '; filename="f"'))[: -len(b"\r\n--b0--\r\n")]
    scanner.feed(begins)
    for piece in (b"x" * 100_000, b"\r" * 100_000, b"\r\n--b" * 20_000):
        given = b"".join(bytes(part) for part in scanner.feed(piece) if not isinstance(part, Value))
        assert len(piece) - len(given) < 10


@pytest.mark.parametrize(
    "body",
    [
        b"--b0\r\nContent-Disposition: form-data; name=" + b"a" * MAX_HEAD_BYTES,
        b"--b0\r\n" + b"a: b\r\n" * MAX_HEAD_BYTES,
        form(("model", b"m" * (MAX_VALUE_BYTES + 1), "")),
        form(("model", b"m" * (MAX_VALUE_BYTES + 1), ""))[:-10],
    ],
)
@pytest.mark.parametrize("step", [1000, 10_000_000])
def test_what_would_have_to_be_held_has_a_bound(body: bytes, step: int) -> None:
    scanner = FormScanner(TYPE, NAMES)
    pieces = [body[at : at + step] for at in range(0, len(body), step)]
    with pytest.raises(InvalidForm, match="too long"):
        [scanner.feed(piece) for piece in pieces]


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="model"',
        b"Content-Disposition: form-data; name*=utf-8''model",
        b"Content-Disposition: form-data; name=model; filename*=utf-8''a",
        b"Content-Disposition: form-data",
        b'Content-Disposition : form-data; name="model"',
        b'Content-Disposition: form-data;\r\n name="model"',
        b'Content-Disposition: form-data; name="model\x00"',
        b'a: b\nContent-Disposition: form-data; name="model"',
        b"",
    ],
)
def test_heads_that_readers_could_understand_differently_are_refused(head: bytes) -> None:
    with pytest.raises(InvalidForm):
        FormScanner(TYPE, NAMES).feed(b"--b0\r\n%b\r\n\r\nm\r\n--b0--\r\n" % head)


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=b0; charset=utf-7",
        b'multipart/form-data; boundary="b\r\n0"',
        b"multipart/form-data; boundary=" + b"b" * 1000,
        b"multipart/form-data; boundary=",
    ],
)
def test_a_form_in_another_charset_or_without_a_clear_boundary_is_refused(content_type: bytes) -> None:
    with pytest.raises(InvalidForm):
        FormScanner(content_type, NAMES)


@pytest.mark.parametrize("between", [b" ", b"\t\r\n", b"x", b"\r", b"\n", b"-"])
def test_what_follows_a_boundary_is_the_next_part_or_the_end(between: bytes) -> None:
    part = b'Content-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    with pytest.raises(InvalidForm):
        FormScanner(TYPE, NAMES).feed(b"--b0\r\n%b--b0%b%b--b0--" % (part, between, part))
