"""docs/troubleshooting.md as what its tests must show: the lines that it quotes, symptom by symptom."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from tests.docs.pages import read

PAGE = "docs/troubleshooting.md"
LEVEL = 3  # of the headings of symptoms
MADE: dict[str, str] = {}  # the test of each symptom
_Test = TypeVar("_Test", bound=Callable[..., Any])


def makes(*titles: str) -> Callable[[_Test], _Test]:
    """Say which symptoms a test makes."""

    def note(test: _Test) -> _Test:
        for title in titles:
            assert MADE.setdefault(title, test.__name__) == test.__name__, f"two tests make {title!r}"
        return test

    return note


def quoted() -> dict[str, list[str]]:
    """The lines that the page quotes, by symptom; `...` in them stands for anything."""
    return {
        section.title: [
            line for block in section.blocks if block.kind == "text" for line in block.text.splitlines()
        ]
        for section in read(PAGE).sections()
        if section.level == LEVEL
    }


def check(title: str, evidence: str) -> None:
    """Fail unless every line that the page quotes for that symptom has been seen."""
    assert title in MADE, f"no test says that it makes {title!r}"
    missing = [line for line in quoted()[title] if not re.search(pattern(line), evidence)]
    assert not missing, "\n".join([f"{title}: not seen:", *missing, "but:", evidence])


def pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("..."))


def rendered(status: int, headers: Mapping[str, str] | Mapping[bytes, bytes], body: bytes) -> str:
    """An answer as `curl -i` shows it."""
    fields = [": ".join(map(_text, field)) for field in headers.items()]
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase if status != 499 else ''}"
    return "\n".join([head, *fields, "", body.decode()])


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
