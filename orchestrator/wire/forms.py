"""Text fields are found in a multipart form (RFC 7578) by their place, so that one can be replaced and all
else stays the client's own bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

MAX_FIELDS: Final = 1000  # of a form; OpenAI's have a dozen

# It warns of each broken form: a client could fill the log, and is told itself.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class InvalidForm(ValueError):
    """The body is no form, or one that its readers could understand differently."""


class Span:
    """A span is where the value of a field is in the body."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


def text_fields(body: bytes, content_type: bytes, names: Collection[str]) -> dict[str, Span]:
    """Return where the fields of these names are, as far as the form has them; files are left out.

    Raises `InvalidForm`; also for a field of `names` that is there twice, of which another reader might take
    the other one.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind.lower() != b"multipart/form-data" or not boundary:
        raise InvalidForm("the content type has no boundary")
    reader = _Reader(body, names)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
    except MultipartParseError as error:
        raise InvalidForm("the body is no multipart form") from error
    if not reader.is_whole:
        raise InvalidForm("the form has no end")
    return reader.found


class _Reader:
    """It follows the parser, which is given the body in one piece: its positions are those of the body."""

    def __init__(self, body: bytes, names: Collection[str]) -> None:
        self.found: dict[str, Span] = {}
        self.is_whole = False
        self._body = body
        self._names = names
        self._count = 0

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._note_name,
            "on_header_value": self._note_value,
            "on_header_end": self._end_header,
            "on_part_data": self._note_data,
            "on_part_end": self._end,
            "on_end": self._end_form,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_FIELDS:
            raise InvalidForm(f"the form has more than {MAX_FIELDS} fields")
        self._name, self._value, self._disposition = b"", b"", b""
        self._start = self._stop = -1

    def _note_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _note_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name, self._value = b"", b""

    def _note_data(self, data: bytes, start: int, end: int) -> None:
        if self._start < 0:
            self._start = start
        self._stop = end

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in self._names or b"filename" in options:
            return
        if name in self.found:
            raise InvalidForm(f"the field '{name}' is given twice")
        self.found[name] = Span(max(self._start, 0), max(self._stop, 0))

    def _end_form(self) -> None:
        self.is_whole = True
