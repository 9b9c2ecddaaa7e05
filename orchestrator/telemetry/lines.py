"""Fields, times and numbers become text for a line."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from orchestrator.config.printing import one_line


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Return the fields as a JSON object and a line end.

    Values that JSON does not know become their `str`.
    """
    try:
        line = orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # a lone surrogate, an integer over 64 bits: rare, and must not be lost
        plain = {one_line(str(key)): one_line(str(value)) for key, value in fields.items()}
        line = orjson.dumps(plain, option=orjson.OPT_APPEND_NEWLINE)
    if line.isascii() and b"\x7f" not in line:
        return line
    return _unsafe_in_json.sub(_escape_json, line.decode()).encode()


# What orjson leaves as it is: DEL, C1 and the two Unicode line ends.
_unsafe_in_json: Final = re.compile(r"[\x7f-\x9f\u2028\u2029]")


def _escape_json(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def timestamp(epoch_s: float) -> str:
    second = int(epoch_s)
    return f"{_to_the_second(second)}{_THOUSANDTHS[int((epoch_s - second) * 1000)]}Z"


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three decimals; `seconds` is not negative.

    `f"{1e3 * seconds:.3f}"` takes twice as long.
    """
    us = int(seconds * 1e6 + 0.5)
    return f"{us // 1000}{_THOUSANDTHS[us % 1000]}"


_THOUSANDTHS: Final = tuple(f".{number:03d}" for number in range(1000))


@functools.lru_cache(maxsize=16)  # lines of a batch share their second
def _to_the_second(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
