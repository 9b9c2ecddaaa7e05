"""This reads YAML 1.2 (core schema) with the place of every value, on PyYAML's event stream.

PyYAML resolves by YAML 1.1: `12:30` becomes 750, `no` False, `010` 8, and of two equal keys the last
silently wins. Here plain scalars follow the YAML 1.2 core schema, equal keys are errors, and a document
can cost neither much memory nor much time: its size, its depth and the number of its values (aliases
expanded) are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import yaml

from orchestrator.config.printing import masked, one_line

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 20_000  # PyYAML's scanner reads some 10,000 values a second
MAX_PROBLEMS = 100
MAX_NUMBER = 100  # characters; int() of a long text takes quadratic time

_TAGS = "tag:yaml.org,2002:"

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]  # keys and list indexes from the root


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A mark is a place in a source: a file's name with line and column from 1, or a name alone (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """A problem is one mistake and where it is."""

    mark: Mark
    message: str

    def __str__(self) -> str:
        """Return its line, which repeats neither secrets nor what steers a terminal."""
        return one_line(masked(f"{self.mark}: {self.message}"))


class YamlError(Exception):
    """The text is not a document that we take. `problems` holds all that were found, at least one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Node:
    """A node is a value and where it is. `mark` is that of its key, or of the item itself in a list."""

    mark: Mark
    value: Scalar | dict[str, Node] | list[Node]
    size: int = 1  # values inside, itself included, aliases expanded

    def data(self) -> Any:
        """Return the plain value: dict, list, str, int, float, bool or None, made anew each time."""
        if isinstance(self.value, dict):
            return {key: child.data() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.data() for child in self.value]
        return self.value

    def find(self, path: Path) -> Node:
        """Return the node at `path`, or the last one on the way there that exists."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                return node
            node = child
        return node

    def child(self, key: str | int) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def replaced(self, path: Path, new: Node) -> Node:
        """Return a copy with `new` at `path`. Missing mappings on the way are made.

        `LookupError` says why there can be no such place.
        """
        if not path:
            return new
        if isinstance(self.value, list):
            return replace(self, value=_with_item(self.value, path, new))
        if self.value is not None and not isinstance(self.value, dict):
            raise LookupError(f"nothing can be inside the value {self.value!r}")
        children = dict(self.value or {})
        child = children.get(str(path[0]), Node(new.mark, None))
        children[str(path[0])] = child.replaced(path[1:], new)
        return replace(self, value=children)


def _with_item(items: list[Node], path: Path, new: Node) -> list[Node]:
    index = path[0]
    if not isinstance(index, int):
        raise LookupError(f"{index!r} is not an index of a list")
    if not 0 <= index < len(items):
        raise LookupError(f"no item {index} in a list of {len(items)}")
    return [*items[:index], items[index].replaced(path[1:], new), *items[index + 1 :]]


def parse(content: bytes | str, source: str, *, is_located: bool = True) -> Node:
    """Return the one document in `content`; an empty one is a node that holds None.

    `source` goes into the marks; with `is_located=False` they are `source` alone (for a value that comes
    from a command line). Raises `YamlError`.
    """
    return _Composer(_decoded(content, source), source, is_located).document()


def _decoded(content: bytes | str, source: str) -> str:
    if len(content) > MAX_BYTES:
        raise YamlError([Problem(Mark(source), f"larger than {MAX_BYTES} bytes")])
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        raise YamlError([Problem(_mark_after(before, source), "not UTF-8")]) from error


def _mark_after(before: str, source: str) -> Mark:
    return Mark(source, before.count("\n") + 1, len(before) - before.rfind("\n"))


class _Composer:
    """A composer builds nodes from events.

    Mistakes that leave the rest readable are collected, others end it.
    """

    def __init__(self, text: str, source: str, is_located: bool) -> None:
        self._text = text
        self._source = source
        self._is_located = is_located
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self._values = 0
        self._problems: list[Problem] = []

    def document(self) -> Node:
        try:
            root = self._read(yaml.parse(self._text, Loader=yaml.BaseLoader))
        except yaml.reader.ReaderError as error:
            mark = _mark_after(self._text[: error.position], self._source)
            self._fail(
                self._located(mark), f"the character U+{ord(self._text[error.position]):04X} is not allowed"
            )
        except yaml.MarkedYAMLError as error:
            self._fail(self._mark(error.problem_mark or error.context_mark), _syntax_message(error))
        if self._problems:
            raise YamlError(sorted(self._problems))
        return root

    def _read(self, events: Iterator[yaml.Event]) -> Node:
        root = Node(self._located(Mark(self._source, 1, 1)), None)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self._values:
                    self._fail(self._mark(event.start_mark), "a second document; only one is read")
                first = next(events)
                root = self._node(first, events, self._mark(first.start_mark), 0)
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], mark: Mark, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            node = self._aliased(event)
            self._count(node.size, event)
            return replace(node, mark=mark)
        if depth > MAX_DEPTH:
            self._fail(self._mark(event.start_mark), f"nested deeper than {MAX_DEPTH} levels")
        self._count(1, event)
        anchor = getattr(event, "anchor", None)  # scalars and collections have one
        if anchor is not None:
            self._anchors[anchor] = None
        node = self._composed(event, events, mark, depth)
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _composed(self, event: yaml.Event, events: Iterator[yaml.Event], mark: Mark, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return Node(mark, self._scalar(event))
        if isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, "seq")
            return self._sequence(events, mark, depth + 1)
        self._check_tag(event, "map")
        return self._mapping(events, mark, depth + 1)

    def _sequence(self, events: Iterator[yaml.Event], mark: Mark, depth: int) -> Node:
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._node(event, events, self._mark(event.start_mark), depth))
        return Node(mark, items, 1 + sum(item.size for item in items))

    def _mapping(self, events: Iterator[yaml.Event], mark: Mark, depth: int) -> Node:
        children: dict[str, Node] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(event)
            key_mark = self._mark(event.start_mark)
            child = self._node(next(events), events, key_mark, depth)
            if key in children:
                self._add(key_mark, f"the key {key!r} was given before, at {_place(children[key].mark)}")
            else:
                children[key] = child
        return Node(mark, children, 1 + sum(child.size for child in children.values()))

    def _key(self, event: yaml.Event) -> str:
        mark = self._mark(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent):
            self._fail(mark, "a key must be plain text")
        key = self._scalar(event)
        if isinstance(key, str):
            return key
        self._add(mark, f'a key must be text: write "{event.value}" in quotes')
        return str(event.value)

    def _aliased(self, event: yaml.AliasEvent) -> Node:
        anchor = str(event.anchor)
        node = self._anchors.get(anchor)
        if node is None:
            why = "is inside itself" if anchor in self._anchors else "has no anchor before it"
            self._fail(self._mark(event.start_mark), f"the alias *{anchor} {why}")
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        if event.tag is None:
            return self._plain(event) if event.implicit[0] else str(event.value)
        if event.tag in (f"{_TAGS}str", "!"):
            return str(event.value)
        value = self._plain(event)
        tag = event.tag.removeprefix(_TAGS)
        if not _is_tagged_right(tag, value):
            self._add(
                self._mark(event.start_mark), f"{event.value!r} does not fit the tag {_short(event.tag)}"
            )
        return float(value) if tag == "float" and type(value) is int else value

    def _plain(self, event: yaml.ScalarEvent) -> Scalar:
        value = str(event.value)
        if len(value) > MAX_NUMBER and (_INT.fullmatch(value) or _FLOAT.fullmatch(value)):
            self._add(self._mark(event.start_mark), f"a number of more than {MAX_NUMBER} characters")
            return value
        return resolve(value)

    def _check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", f"{_TAGS}{kind}"):
            self._add(self._mark(event.start_mark), f"the tag {_short(event.tag)} does not fit here")

    def _count(self, values: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            self._fail(
                self._mark(event.start_mark), f"more than {MAX_VALUES} values, aliases counted in full"
            )

    def _mark(self, mark: Any) -> Mark:
        if mark is None:
            return Mark(self._source)
        return self._located(Mark(self._source, mark.line + 1, mark.column + 1))

    def _located(self, mark: Mark) -> Mark:
        return mark if self._is_located else Mark(self._source)

    def _add(self, mark: Mark, message: str) -> None:
        self._problems.append(Problem(mark, message))
        if len(self._problems) >= MAX_PROBLEMS:
            raise YamlError(sorted(self._problems))

    def _fail(self, mark: Mark, message: str) -> NoReturn:
        self._add(mark, message)
        raise YamlError(sorted(self._problems))


def _place(mark: Mark) -> str:
    return f"line {mark.line}" if mark.line else str(mark)


def _short(tag: str) -> str:
    return tag.replace(_TAGS, "!!")


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    return " ".join(part for part in (error.context, error.problem) if part) or "not YAML"


def _is_tagged_right(tag: str, value: Scalar) -> bool:
    if tag == "float":
        return isinstance(value, float | int) and not isinstance(value, bool)
    return type(value) is {"int": int, "bool": bool, "null": type(None)}.get(tag)


# --- the core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution -----------------------------

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **{"-" + word: -math.inf for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


def resolve(text: str) -> Scalar:
    """Return what a plain (unquoted, untagged) scalar means. Numbers have at most `MAX_NUMBER` characters."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
