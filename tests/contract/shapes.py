"""What a JSON document looks like: its keys, and the types of its values.

A shape is a type (`float` takes integers too), None, `Is(value)`, `Either(shape, shape)`, `Each(shape)` for
a map of any keys, `[shape]` for a list that is not empty, or a dict with exactly these keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Either:
    def __init__(self, *shapes: Any) -> None:
        self.shapes = shapes


@dataclass(frozen=True)
class Is:
    value: Any


@dataclass(frozen=True)
class Each:
    shape: Any


def differences(value: Any, shape: Any, at: str = "$") -> list[str]:
    """What of the document is not of the shape, one line each; empty if it is."""
    match shape:
        case Either():
            return _of_either(value, shape, at)
        case Is(expected):
            return [] if value == expected else [f"{at} is {value!r}, not {expected!r}"]
        case Each(inner) if isinstance(value, dict):
            return [line for key in value for line in differences(value[key], inner, f"{at}.{key}")]
        case dict() if isinstance(value, dict):
            return _of_object(value, shape, at)
        case [inner] if isinstance(value, list):
            found = [line for n, one in enumerate(value) for line in differences(one, inner, f"{at}[{n}]")]
            return found if value else [f"{at} is empty"]
        case None:
            return [] if value is None else [f"{at} is {value!r}, not null"]
        case type():
            return [] if _is_a(value, shape) else [f"{at} is {value!r}, no {shape.__name__}"]
    return [f"{at} is {value!r}"]


def assert_shape(value: Any, shape: Any) -> None:
    assert differences(value, shape) == []


def _of_either(value: Any, shape: Either, at: str) -> list[str]:
    found = [differences(value, one, at) for one in shape.shapes]
    return min(found, key=len)


def _of_object(value: dict[str, Any], shape: dict[str, Any], at: str) -> list[str]:
    missing = [f"{at}.{key} is missing" for key in shape.keys() - value.keys()]
    unknown = [f"{at}.{key} is unexpected" for key in value.keys() - shape.keys()]
    common = value.keys() & shape.keys()
    return (
        missing
        + unknown
        + [line for key in common for line in differences(value[key], shape[key], f"{at}.{key}")]
    )


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
