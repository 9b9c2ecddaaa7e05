from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.yaml12 import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Mark, Node, YamlError, parse


def data(text: str | bytes) -> Any:
    return parse(text, "f").data()


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(YamlError) as caught:
        parse(text, "f")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),  # 750 in YAML 1.1
        ("no", "no"),
        ("yes", "yes"),
        ("On", "On"),
        ("y", "y"),
        ("010", 10),  # 8 in YAML 1.1
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("+12", 12),
        ("-7", -7),
        ("2001-01-01", "2001-01-01"),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("-1.5E-3", -0.0015),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1.2.3", "1.2.3"),
        ("true", True),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 12", "12"),
        ("! 12", "12"),
        ("!!float 3", 3.0),
        ("!!int 3", 3),
        ("!!null ''", None),
        ("|\n  12\n", "12\n"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = data(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan() -> None:
    assert math.isnan(data(".nan"))


def test_a_key_that_looks_like_a_merge_is_only_a_key() -> None:
    assert data("<<: {a: 1}") == {"<<": {"a": 1}}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "---\n...\n"])
def test_an_empty_document_is_none(text: str) -> None:
    assert data(text) is None


def test_a_directive_does_not_bring_the_old_rules_back() -> None:
    assert data("%YAML 1.1\n---\na: on") == {"a": "on"}


def test_bytes_may_start_with_a_byte_order_mark() -> None:
    assert data("a: é".encode("utf-8-sig")) == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", ["f:3:1: the key 'a' was given before, at line 1"]),
        ("a: {b: 1, 'b': 2}", ["f:1:11: the key 'b' was given before, at line 1"]),
        ("a: 1\na: 2\nb: 1\nb: 2", ["f:2:1: the key", "f:4:1: the key"]),
        ("1: x\nnull: y", ['f:1:1: a key must be text: write "1" in quotes', "f:2:1: a key must be text"]),
        ("? [a]\n: 1", ["f:1:3: a key must be plain text"]),
        ("a: *b", ["f:1:4: the alias *b has no anchor before it"]),
        ("a: &b [1, *b]", ["f:1:11: the alias *b is inside itself"]),
        ("a: !!int no", ["f:1:4: 'no' does not fit the tag !!int"]),
        ("a: !!bool 1", ["f:1:4: '1' does not fit the tag !!bool"]),
        ("a: !own {}", ["f:1:4: the tag !own does not fit here"]),
        ("a: !!seq {}", ["f:1:4: the tag !!seq does not fit here"]),
        ("a: 1\n--- \nb: 2", ["f:2:1: a second document; only one is read"]),
        ("a: [1, 2", ["f:1:9: while parsing a flow sequence"]),
        ("a: b: c", ["f:1:5: mapping values are not allowed here"]),
        ("a:\n\t- b", ["f:2:1: while scanning for the next token found character '\\t'"]),
        ("a: @b", ["f:1:4: while scanning for the next token found character '@'"]),
        ("a: 1\nb: \x07", ["f:2:4: the character U+0007 is not allowed"]),
        (b"a: 1\nb: \xff", ["f:2:4: not UTF-8"]),
        ("a: " + "9" * 5000, ["f:1:4: a number of more than 100 characters"]),
        ("x" * (MAX_BYTES + 1), [f"f: larger than {MAX_BYTES} bytes"]),
    ],
)
def test_mistakes_have_their_place(text: str | bytes, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_deep_nesting_is_refused_soon() -> None:
    assert f"nested deeper than {MAX_DEPTH} levels" in problems("[" * 100_000)[0]
    assert f"nested deeper than {MAX_DEPTH} levels" in problems("- " * 100_000 + "a")[0]


def test_an_alias_bomb_is_refused_soon() -> None:
    letters = "abcdefghijklmnop"
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in itertools.pairwise(letters)
    )
    started = time.process_time()
    assert f"more than {MAX_VALUES} values" in problems(text)[0]
    assert time.process_time() - started < 1


def test_an_alias_is_a_copy_with_a_place_of_its_own() -> None:
    root = parse("a: &x [1, 2]\nb: *x", "f")
    found = root.data()
    assert found == {"a": [1, 2], "b": [1, 2]}
    assert found["a"] is not found["b"]
    assert root.find(("b",)).mark == Mark("f", 2, 1)


def test_places_of_keys_and_items() -> None:
    root = parse("a:\n  - x: 1\n    y: [p, q]\n  - z\n", "f")
    assert str(root.find(("a",)).mark) == "f:1:1"
    assert str(root.find(("a", 0)).mark) == "f:2:5"
    assert str(root.find(("a", 0, "y")).mark) == "f:3:5"
    assert str(root.find(("a", 0, "y", 1)).mark) == "f:3:12"
    assert str(root.find(("a", 1)).mark) == "f:4:5"


def test_a_place_that_is_not_there_is_that_of_what_is_around() -> None:
    root = parse("a:\n  b: 1\n", "f")
    assert str(root.find(("a", "none", "deeper")).mark) == "f:1:1"
    assert str(root.find(("a", "b", 3)).mark) == "f:2:3"


def test_without_places_marks_are_the_source_alone() -> None:
    assert str(parse("{a: [1]}", "--set x", is_located=False).find(("a", 0)).mark) == "--set x"
    with pytest.raises(YamlError, match=r"^--set x: the key 'a' was given before, at --set x$"):
        parse("{a: 1, a: 2}", "--set x", is_located=False)


def test_replacing_leaves_the_original_alone() -> None:
    root = parse("a: [{b: 1}, {b: 1}]", "f")
    new = parse("2", "--set a.1.b", is_located=False)
    changed = root.replaced(("a", 1, "b"), new)
    assert changed.data() == {"a": [{"b": 1}, {"b": 2}]}
    assert root.data() == {"a": [{"b": 1}, {"b": 1}]}
    assert str(changed.find(("a", 1, "b")).mark) == "--set a.1.b"


def test_replacing_makes_the_mappings_on_the_way() -> None:
    root = Node(Mark("f"), None)
    assert root.replaced(("a", "b"), Node(Mark("s"), 1)).data() == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (("a", 2, "b"), "no item 2 in a list of 2"),
        (("a", "x"), "'x' is not an index of a list"),
        (("c", "x"), "nothing can be inside the value 1"),
    ],
)
def test_there_are_places_that_cannot_be(path: tuple[str | int, ...], why: str) -> None:
    with pytest.raises(LookupError, match=why):
        parse("{a: [1, 2], c: 1}", "f").replaced(path, Node(Mark("s"), 1))


# Outside of the basic plane JSON needs two escapes, which YAML reads as two characters.
_TEXTS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=20)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(_JSON)
def test_json_is_read_as_json(document: Any) -> None:
    assert data(json.dumps(document)) == document


@given(st.dictionaries(_TEXTS, st.lists(_TEXTS, max_size=3), max_size=5))
def test_marks_point_at_keys_and_items(document: dict[str, list[str]]) -> None:
    text = json.dumps(document, indent=2)
    lines = text.split("\n")
    root = parse(text, "f")
    for key, items in document.items():
        for path, written in (((key,), key), *(((key, index), item) for index, item in enumerate(items))):
            mark = root.find(path).mark
            assert lines[mark.line - 1][mark.column - 1 :].startswith(json.dumps(written))


@given(st.text(alphabet="ab1:-?[]{},&*!|>'\"%@# \n\t~.", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(YamlError):
        data(text)
