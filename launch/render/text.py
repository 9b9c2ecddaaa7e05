"""Objects become YAML, always the same for the same objects, with the reasons as comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.render.tree import Noted, Object, Scalar, Tree, Value

WIDTH = 80  # of comments

# What no reader of YAML, of 1.1 or of 1.2, takes for anything but a text.
_is_safe = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*").fullmatch
_TAKEN = frozenset(["true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "nan", "inf"])
_unprintable = re.compile(
    r"[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)

Written = Callable[["Scalar | Value"], str]


def document(objects: Sequence[Object], written: Written) -> str:
    """Return the objects as one file, each a document of its own."""
    return "---\n".join("".join(f"{line}\n" for line in _mapping(one, written)) for one in objects)


def scalar(value: Scalar | Value) -> str:
    """Return a value as it stands in YAML."""
    if isinstance(value, Value):
        value = value.default
    if isinstance(value, str):
        is_plain = _is_safe(value) and value.lower() not in _TAKEN
        return value if is_plain else quoted(value)
    text = json.dumps(value)
    return text if "." in text else text.replace("e", ".0e") if isinstance(value, float) else text


def quoted(text: str) -> str:
    """Return a text in double quotes, all that is not printable escaped."""
    return _unprintable.sub(_escape, json.dumps(text, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def _mapping(tree: Mapping[str, Tree], written: Written) -> Iterator[str]:
    for key, item in tree.items():
        yield from _reason(item)
        yield from _entry(f"{scalar(key)}:", _bare(item), written)


def _list(tree: Sequence[Tree], written: Written) -> Iterator[str]:
    for item in tree:
        yield from _reason(item)
        yield from _item(_bare(item), written)


def _entry(head: str, item: Tree, written: Written) -> Iterator[str]:
    """Yield the lines of one key with what it holds."""
    if isinstance(item, str) and _is_block(item):
        yield f"{head} |"
        yield from (f"  {line}" if line else "" for line in item.splitlines())
    elif not item and isinstance(item, Mapping | Sequence) and not isinstance(item, str):
        yield f"{head} {'{}' if isinstance(item, Mapping) else '[]'}"
    elif isinstance(item, Mapping):
        yield head
        yield from (f"  {line}" if line else "" for line in _mapping(item, written))
    elif isinstance(item, Sequence) and not isinstance(item, str):
        yield head
        yield from (f"  {line}" if line else "" for line in _list(item, written))
    else:
        yield f"{head} {written(_as_scalar(item))}"


def _item(item: Tree, written: Written) -> Iterator[str]:
    """Yield the lines of one item of a list: a mapping begins behind its hyphen."""
    if not isinstance(item, Mapping) or not item:
        yield from _entry("-", item, written)
        return
    lines = [*_mapping(item, written)]
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    yield from lines[:first]
    yield f"- {lines[first]}"
    yield from (f"  {line}" if line else "" for line in lines[first + 1 :])


def _as_scalar(item: Tree) -> Scalar | Value:
    if item is None or isinstance(item, str | int | float | Value):
        return item
    raise TypeError(f"{type(item).__name__} is no value")


def _bare(item: Tree) -> Tree:
    return _bare(item.tree) if isinstance(item, Noted) else item


def _reason(item: Tree) -> Iterator[str]:
    if isinstance(item, Noted):
        yield from (f"# {line}" for line in textwrap.wrap(item.why, WIDTH, break_on_hyphens=False))
        yield from _reason(item.tree)


def _is_block(text: str) -> bool:
    """Tell whether a text of several lines can stand as it is."""
    is_whole = text.endswith("\n") and not text.endswith("\n\n") and text[0] not in " \n"
    return is_whole and not any(map(_unprintable.search, text.split("\n")))
