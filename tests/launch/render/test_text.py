"""What is written is read again as it was, by YAML 1.1 as well as by 1.2, comments aside."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.render.helm import template
from launch.render.text import document, scalar
from launch.render.tree import Noted, Tree, Value, plain
from orchestrator.config.yaml12 import parse

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.one_of(
    texts,
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(texts, inner, max_size=4),
        st.builds(Noted, inner, st.text("abc :#-{}'\"", max_size=200)),
    ),
    max_leaves=15,
)
tricky = [
    *(
        "",
        " ",
        "a ",
        " a",
        "~",
        "null",
        "Yes",
        "no",
        "0x1f",
        "1_000",
        "1e3",
        "12:30",
        ".inf",
        "-",
        "- a",
        "a: b",
    ),
    *(
        "a #b",
        "#",
        "&a",
        "*a",
        "!a",
        "|",
        ">",
        "%a",
        "@a",
        "`a",
        "{",
        "[a]",
        "'",
        '"',
        "\\",
        "a\tb",
        "\u2028",
    ),
    *(
        "\x00",
        "\x7f",
        "\x85",
        "\ufeff",
        "😀",
        "a\nb",
        "a\n",
        "\n",
        "a\n\nb\n",
        "a\n\n",
        " a\n",
        "a \nb\n",
        "=",
        "<<",
    ),
]


def both(text: str) -> Any:
    """The document, if both readers agree on it."""
    (read,) = yaml.safe_load_all(text)
    assert parse(text.encode(), "x").data() == read
    return read


@given(st.dictionaries(texts, trees, min_size=1, max_size=4))
def test_what_is_written_is_read(tree: dict[str, Tree]) -> None:
    assert yaml.safe_load(document([tree], scalar)) == plain(tree)


@pytest.mark.parametrize("text", tricky)
def test_texts_that_look_like_something_else(text: str) -> None:
    tree: dict[str, Tree] = {"a": text, "b": [text, {"c": text, "d": text}], "e": {"f": text}}
    assert both(document([tree], scalar)) == tree


@pytest.mark.parametrize("number", [0, -1, 1.5, 1e-05, 1e16, 5.0, 2**53, True, None])
def test_numbers(number: Any) -> None:
    read = both(document([{"a": number}], scalar))
    assert read == {"a": number}


def test_a_reason_stands_above_its_part() -> None:
    tree: dict[str, Tree] = {
        "a": [Noted({"b": 1, "c": Noted("d", "why d")}, "why the item")],
        "e": Noted({}, "why e"),
    }
    assert document([tree], scalar).splitlines() == [
        "a:",
        "  # why the item",
        "  - b: 1",
        "    # why d",
        "    c: d",
        "# why e",
        "e: {}",
    ]


def test_the_first_key_of_an_item_may_have_a_reason() -> None:
    tree: dict[str, Tree] = {"a": [{"b": Noted(1, "why b"), "c": 2}]}
    text = document([tree], scalar)
    assert text == "a:\n  # why b\n  - b: 1\n    c: 2\n"


def test_several_objects_are_documents() -> None:
    text = document([{"a": 1}, {"b": 2}], scalar)
    assert text == "a: 1\n---\nb: 2\n"
    assert list(yaml.safe_load_all(text)) == [{"a": 1}, {"b": 2}]


def test_a_template_has_values_and_nothing_else_of_helm() -> None:
    tree: dict[str, Tree] = {"a": Value("x", ".Values.x"), "b": Value(2, ".Values.y"), "c": "{{ .Values.x }}"}
    assert template([tree]).splitlines() == [
        "a: {{ .Values.x | quote }}",
        "b: {{ .Values.y | int }}",
        'c: "{{ "{{" }} .Values.x }}"',
    ]
