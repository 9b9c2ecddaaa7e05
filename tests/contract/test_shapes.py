from __future__ import annotations

from typing import Any

import pytest

from tests.contract.shapes import Each, Either, Is, differences


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1, int),
        (1, float),
        (None, None),
        (None, Either(str, None)),
        ("x", Is("x")),
        ([1, 2], [int]),
        ({"a": 1}, {"a": int}),
        ({"7": {"b": "x"}}, Each({"b": str})),
    ],
)
def test_of_the_shape(value: Any, shape: Any) -> None:
    assert differences(value, shape) == []


@pytest.mark.parametrize(
    ("value", "shape", "said"),
    [
        (1.5, int, "$ is 1.5, no int"),
        (True, int, "$ is True, no int"),
        (0, None, "$ is 0, not null"),
        (1, Either(str, None), "$ is 1, no str"),
        ("y", Is("x"), "$ is 'y', not 'x'"),
        ([], [int], "$ is empty"),
        ({}, [int], "$ is {}"),
        ([1, "2"], [int], "$[1] is '2', no int"),
        ({}, {"a": int}, "$.a is missing"),
        ({"a": 1}, {}, "$.a is unexpected"),
        ({"a": {"b": 1}}, {"a": {"b": str}}, "$.a.b is 1, no str"),
        ({"7": {"b": 1}}, Each({"b": str}), "$.7.b is 1, no str"),
    ],
)
def test_not_of_the_shape(value: Any, shape: Any, said: str) -> None:
    assert differences(value, shape) == [said]
