"""Text fields are found in a multipart form (RFC 7578) while it comes in, so that one can be replaced and all
else stays the client's own bytes.

What a reader behind us could understand in another way is refused: nobody is to say something to a worker
that was not seen here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from python_multipart.multipart import parse_options_header

MAX_FIELDS: Final = 1000  # of a form; OpenAI's have a dozen
MAX_HEAD_BYTES: Final = 8 * 1024  # of a part
MAX_VALUE_BYTES: Final = 16 * 1024  # of a field that is looked at

_MEDIA_TYPE: Final = b"multipart/form-data"
_MAX_BOUNDARY: Final = 200  # characters; RFC 2046 allows 70
_BREAK: Final = b"\r\n"
_HEAD_END: Final = b"\r\n\r\n"
_FORM_END: Final = b"--"
_DISPOSITION: Final = b"content-disposition"
_match_line: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)").fullmatch
# Some readers go by `name*` and `filename*` (RFC 5987), which are not to be in a form.
_has_other_name: Final = re.compile(rb"[; ]name\*", re.IGNORECASE).search

# What is next of a form.
_START, _DELIMITED, _VALUE, _KEPT_VALUE, _EPILOGUE = range(5)


class InvalidForm(ValueError):
    """The body is no form, or one that its readers could understand differently."""


class Value:
    """A value is that of a field that is looked at."""

    __slots__ = ("content", "name")

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = content


Piece = bytes | memoryview | Value


class FormScanner:
    """A scanner takes a form as it comes, in whatever pieces, and returns it: what lies between the values of
    the fields that are looked at, and these values, each once it is whole. It never holds more than one of
    these, or the head of a part.
    """

    def __init__(self, content_type: bytes, names: Collection[str]) -> None:
        """Text fields of these names are looked at. Raises `InvalidForm` if the content type has no boundary
        that is clear.
        """
        self.found: dict[str, bytes] = {}  # the values that were returned, by the names of their fields
        self.is_whole = False
        self._names = names
        self._delimiter = b"\r\n--" + _boundary(content_type)
        self._state = _START
        self._rest = b""  # the beginning of something of which more is to come
        self._raw: list[bytes] = []  # of a value that is looked at, as far as it has come
        self._raw_size = 0
        self._name = ""  # of its field
        self._count = 0
        self._start = 0  # of what is not returned yet, in the present piece
        self._out: list[Piece] = []

    def feed(self, data: bytes) -> list[Piece]:
        """Take the next piece, and return what can go on. Raises `InvalidForm`; it is not to be called then.

        The pieces that are returned may be views of `data`.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        self._start = at = 0
        out = self._out = []
        while at >= 0:
            at = self._step(data, at)
        return out

    def finish(self) -> None:
        """Note that nothing more comes. Raises `InvalidForm` if the form has no end."""
        if not self.is_whole:
            raise InvalidForm("the form has no end")

    # --- step by step: each returns where the next one begins, -1 if it takes more than has come ----------

    def _step(self, data: bytes, at: int) -> int:
        state = self._state
        if state == _VALUE:
            return self._pass_value(data, at)
        if state == _KEPT_VALUE:
            return self._keep_value(data, at)
        if state == _DELIMITED:
            return self._read_head(data, at)
        if state == _START:
            return self._begin(data)
        return self._wait(data, len(data))

    def _wait(self, data: bytes, at: int) -> int:
        """Return all before `at`, and keep what is behind it until more has come."""
        self._give(data, at)
        self._rest = data[at:]
        return -1

    def _give(self, data: bytes, end: int) -> None:
        if end > self._start:
            whole = self._start == 0 and end == len(data)
            self._out.append(data if whole else memoryview(data)[self._start : end])
        self._start = end

    def _begin(self, data: bytes) -> int:
        opening = self._delimiter[len(_BREAK) :]
        if len(data) < len(opening) and opening.startswith(data):
            return self._wait(data, 0)
        if not data.startswith(opening):
            raise InvalidForm("the body is no multipart form")
        self._state = _DELIMITED
        return len(opening)

    def _read_head(self, data: bytes, at: int) -> int:
        """Read what follows a delimiter: the end of the form, or the head of a part."""
        mark = data[at : at + len(_BREAK)]
        if mark == _FORM_END:
            self.is_whole = True
            self._state = _EPILOGUE
            return at
        if mark not in (_BREAK, _BREAK[:1], _FORM_END[:1], b""):
            raise InvalidForm("something follows a boundary of the form")
        end = data.find(_HEAD_END, at)
        if (len(data) if end < 0 else end) - at > MAX_HEAD_BYTES:
            raise InvalidForm("a part of the form has too long a head")
        if end < 0:
            return self._wait(data, at)
        self._begin_part(_fields(data[at + len(_BREAK) : end]))
        at = end + len(_HEAD_END)
        if self._state == _KEPT_VALUE:
            self._give(data, at)
        return at

    def _begin_part(self, disposition: bytes) -> None:
        self._count += 1
        if self._count > MAX_FIELDS:
            raise InvalidForm(f"the form has more than {MAX_FIELDS} fields")
        self._state = _VALUE
        name, is_file = _name_of(disposition)
        if name not in self._names or is_file:
            return
        if b"*" in disposition:
            raise InvalidForm(f"the field '{name}' is named in two ways")
        if name in self.found:
            raise InvalidForm(f"the field '{name}' is given twice")
        self._state = _KEPT_VALUE
        self._name, self._raw, self._raw_size = name, [], 0

    def _pass_value(self, data: bytes, at: int) -> int:
        end = data.find(self._delimiter, at)
        if end < 0:
            return self._wait(data, self._last_possible(data, at))
        self._state = _DELIMITED
        return end + len(self._delimiter)

    def _keep_value(self, data: bytes, at: int) -> int:
        end = data.find(self._delimiter, at)
        is_whole = end >= 0
        if not is_whole:
            end = self._last_possible(data, at)
        self._raw.append(data[at:end])
        self._raw_size += end - at
        if self._raw_size > MAX_VALUE_BYTES:
            raise InvalidForm(f"the field '{self._name}' is too long")
        self._start = end
        if not is_whole:
            return self._wait(data, end)
        self.found[self._name] = value = b"".join(self._raw)
        self._out.append(Value(self._name, value))
        self._state = _DELIMITED
        return end + len(self._delimiter)

    def _last_possible(self, data: bytes, at: int) -> int:
        """Return where a delimiter may have begun of which the end is still to come."""
        size = len(data)
        found = data.rfind(b"\r", max(at, size - len(self._delimiter) + 1))
        return size if found < 0 else found


class Span:
    """A span is where the value of a field is in the body."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


def text_fields(
    body: bytes, content_type: bytes, names: Collection[str], *, is_whole: bool = True
) -> dict[str, Span]:
    """Return where the fields of these names are, as far as the form has them; files are left out.

    Raises `InvalidForm`; also for a field of `names` that is there twice, of which another reader might take
    the other one, and for a form without an end unless `is_whole` says that it may have none.
    """
    scanner = FormScanner(content_type, names)
    found: dict[str, Span] = {}
    at = 0
    for piece in scanner.feed(body):
        size = len(piece.content if isinstance(piece, Value) else piece)
        if isinstance(piece, Value):
            found[piece.name] = Span(at, at + size)
        at += size
    if is_whole:
        scanner.finish()
    return found


def _boundary(content_type: bytes) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind.lower() != _MEDIA_TYPE or not boundary:
        raise InvalidForm("the content type has no boundary")
    if len(boundary) > _MAX_BOUNDARY or b"\r" in boundary or b"\n" in boundary:
        raise InvalidForm("the content type has no valid boundary")
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise InvalidForm("the form is in another charset than UTF-8")
    return boundary


def _fields(head: bytes) -> bytes:
    """Return what the head of a part says of its disposition."""
    found = b""
    for line in head.split(_BREAK):
        matched = _match_line(line)
        if matched is None:
            raise InvalidForm("a part of the form has an invalid head")
        if matched[1].lower() == _DISPOSITION:
            if found:
                raise InvalidForm("a part of the form has two dispositions")
            found = matched[2].strip(b" ")
    return found


def _name_of(disposition: bytes) -> tuple[str, bool]:
    """Return the name of a part, and whether it is a file."""
    _, options = parse_options_header(disposition)
    name = options.get(b"name")
    if name is None:
        raise InvalidForm("a part of the form has no name")
    if _has_other_name(disposition):
        raise InvalidForm("a part of the form is named in two ways")
    return name.decode("utf-8", "replace"), b"filename" in options
