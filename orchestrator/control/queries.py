"""Queries of admin pages are read strictly: what is misspelt is refused, and so is what makes no sense."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from starlette.datastructures import QueryParams

from orchestrator.errors import ClientError

MOST_DIGITS: Final = 15
MOST_TEXT: Final = 1000  # characters: no name that is looked for is longer
_SWITCHES: Final = {"0": False, "false": False, "1": True, "true": True, "": True}


class Query:
    """A query has the parameters that a page knows. Everything here raises `ClientError`."""

    def __init__(self, given: QueryParams, known: Collection[str], repeated: Collection[str] = ()) -> None:
        """`repeated` are those that may be given several times."""
        self._given = given
        for name in given:
            if name not in known and name not in repeated:
                all_known = ", ".join([*known, *repeated])
                raise ClientError(
                    f"unknown parameter {name[:100]!r}; there is: {all_known}", param=name[:100]
                )
            if name not in repeated and len(given.getlist(name)) > 1:
                raise ClientError(f"'{name}' is given more than once", param=name)

    def texts(self, name: str) -> list[str]:
        found = self._given.getlist(name)
        if any(len(text) > MOST_TEXT for text in found):
            raise ClientError(f"'{name}' has more than {MOST_TEXT} characters", param=name)
        return found

    def text(self, name: str) -> str | None:
        return next(iter(self.texts(name)), None)

    def number(self, name: str, default: int, most: int = 10**MOST_DIGITS) -> int:
        given = self._given.get(name)
        if given is None:
            return default
        if not (given.isascii() and given.isdigit() and len(given) <= MOST_DIGITS and int(given) <= most):
            raise ClientError(f"'{name}' is a whole number from 0 to {most}", param=name)
        return int(given)

    def seconds(self, name: str) -> float:
        """Return a number of seconds; 0.0 if none is given."""
        given = self._given.get(name, "0")
        try:
            seconds = float(given[:MOST_TEXT])
        except ValueError:
            seconds = math.nan
        if not 0.0 <= seconds < math.inf:
            raise ClientError(f"'{name}' is a number of seconds, 0 or more", param=name)
        return seconds

    def switch(self, name: str) -> bool:
        given = self._given.get(name)
        if given is None:
            return False
        if given not in _SWITCHES:
            raise ClientError(f"'{name}' is 1 or 0", param=name)
        return _SWITCHES[given]
