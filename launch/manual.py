"""The manual of the config: what `baton explain OPTION` prints, and docs/config.md as a whole.

Both are made of the JSON Schema, so that an option is described where it is declared, and nowhere else.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

WIDTH: Final = 100

_ROLES: Final = re.compile(r"(?<=^models\.\*\.)(prefill|decode|both)(?=\.|$)")
_NO_INDEX: Final = re.compile(r"^models\.(prefill|decode|both)(?=\.|$)")
_INDEX: Final = re.compile(r"\[(\d+|\*)\]|(?<=\.)\d+(?=\.|$)")
_TYPES: Final = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
}
_HEAD: Final = """\
# Configuration

A config is a YAML file (1.2: `no` is a text, and so is `12:30`). `baton init` writes one to start from,
`baton check` names all its mistakes at once, `baton explain OPTION` prints what stands here about one option,
and `baton schema` the JSON Schema, by which editors complete and explain options. `--set KEY.PATH=VALUE`
overrides one value.

An option with a `*` in its last column may change while the orchestrator runs: a reload (SIGHUP,
`/admin/reload`) takes it over. All others need a restart. Names with an `_s` at their end are in seconds.

This page is made by `python -m launch.manual`.
"""


class NoSuchOption(Exception):
    """There is no option of this name; the message says which may be meant."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that an option may name, with its arguments."""

    name: str
    about: str
    arguments: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """An option or a section. Its name is as `--set` has it, with `*` for an index and ROLE for a pool's."""

    name: str
    about: str
    kind: str
    default: str  # as YAML; "" if it must be given
    is_reloadable: bool
    policies: tuple[Policy, ...] = ()
    inner: tuple[Option, ...] = field(default=())  # of a section

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]


def options() -> tuple[Option, ...]:
    """Return the options of the file, the sections with what is in them."""
    from orchestrator.config.file import json_schema

    schema = json_schema()
    return tuple(_inner(schema, schema["$defs"], ""))


def explained(name: str) -> str:
    """Return what is to be known about an option, as lines for a terminal. Raises `NoSuchOption`."""
    known = {option.name: option for option in _walk(options())}
    wanted = _ROLES.sub("ROLE", _INDEX.sub(lambda found: ".*" if found[1] else "*", name))
    if wanted not in known:
        nearest = _nearest(wanted, known)
        hint = f", did you mean {nearest!r}?" if nearest else ""
        raise NoSuchOption(f"there is no option {name!r}{hint}")
    return "\n".join(_lines(known[wanted])) + "\n"


def overview() -> str:
    """Return a line for each section, as `baton explain` alone prints them."""
    return "\n".join(_rows((option.name, option.about) for option in options())) + "\n"


def page() -> str:
    """Return docs/config.md."""
    parts = [_HEAD, *_section("The file", "", options())]
    for option in _walk(options()):
        if option.inner:
            parts += _section(f"`{option.name}`", option.about, option.inner)
        if option.policies:
            parts += _policies(option)
    return "\n".join(parts)


# --- the schema ---------------------------------------------------------------------------------------

_Schema = Mapping[str, Any]


def _inner(model: _Schema, models: _Schema, section: str) -> Iterator[Option]:
    required = model.get("required", ())
    seen = False
    for key, schema in model.get("properties", {}).items():
        name = _ROLES.sub("ROLE", f"{section}{key}")
        if name.endswith(".ROLE"):
            if seen:
                continue
            seen = True
        yield _option(name, schema, models, is_required=key in required)


def _option(name: str, schema: _Schema, models: _Schema, *, is_required: bool) -> Option:
    reference, is_list = _reference(schema)
    inner: tuple[Option, ...] = ()
    about = schema.get("description", "")
    if name.endswith(".ROLE"):
        about = "A pool of workers: `prefill` and `decode`, or `both`, whose workers do both."
    if reference is not None:
        inner = tuple(_inner(models[reference], models, f"{name}.*." if is_list else f"{name}."))
    elif (mapping := _mapping_in(schema)) is not None:
        inner = tuple(_inner(mapping, models, f"{name}."))
    return Option(
        name,
        about,
        _kind(schema, inner if reference is not None else (), is_list=is_list),
        "" if is_required or inner or "default" not in schema else _yaml(schema["default"]),
        bool(schema.get("x-reloadable")),
        tuple(_policies_in(name, schema)),
        inner,
    )


def _reference(schema: _Schema) -> tuple[str | None, bool]:
    """Return the model of a section, and whether there is a list of them."""
    for one in (schema, *schema.get("anyOf", ())):
        if "$ref" in one:
            return one["$ref"].rpartition("/")[2], False
        if "$ref" in one.get("items", {}):
            return one["items"]["$ref"].rpartition("/")[2], True
    return None, False


def _mapping_in(schema: _Schema) -> _Schema | None:
    """Return the mapping that may stand in place of a number; None if there is none."""
    found = (one for one in schema.get("anyOf", ()) if "policy" not in one.get("properties", {"policy": 0}))
    return next(found, None)


def _policies_in(name: str, schema: _Schema) -> Iterator[Policy]:
    for one in schema.get("anyOf", ()):
        if "policy" in one.get("properties", {}):
            arguments = (
                _option(f"{name}.{key}", argument, {}, is_required=False)
                for key, argument in one["properties"].items()
                if key != "policy"
            )
            yield Policy(one["title"], one["description"], tuple(arguments))


def _kind(schema: _Schema, inner: Sequence[Option], *, is_list: bool = False) -> str:
    """Say what a value may be."""
    if inner:
        return "list of sections" if is_list else "section"
    choices = [one for one in schema.get("anyOf", (schema,)) if one.get("type") != "null"]
    if any("policy" in one.get("properties", {}) for one in choices):
        return "policy: its name, or a mapping with its arguments"
    return " or ".join(dict.fromkeys(map(_one_kind, choices)))


def _one_kind(schema: _Schema) -> str:
    if "enum" in schema:
        return ", ".join(map(_yaml, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_plural(_one_kind(schema.get('items', {})))}"
    return f"{_TYPES.get(schema.get('type', ''), 'value')}{_bounds(schema)}"


def _plural(kind: str) -> str:
    name, space, bounds = kind.partition(" (")
    return kind if "," in name else f"{name}s{space}{bounds}"


def _bounds(schema: _Schema) -> str:
    words = [
        f"{word} {_yaml(schema[key])}"
        for key, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema and abs(schema[key]) < 1e9  # what nobody comes to is no bound that one has to know
    ]
    return f" ({', '.join(words)})" if words else ""


def _yaml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        if value.keys() == {"policy"}:
            return str(value["policy"])
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) and value < 1e6 else str(value) or '""'


def _walk(found: Sequence[Option]) -> Iterator[Option]:
    for option in found:
        yield option
        yield from _walk(option.inner)


def _nearest(wanted: str, known: Mapping[str, Option]) -> str | None:
    """Return the option that is probably meant: sections are mixed up more often than keys are misspelt."""
    wanted = _NO_INDEX.sub("models.*.ROLE", wanted)
    key = wanted.rpartition(".")[2]
    same = sorted((name for name in known if name.rpartition(".")[2] == key), key=len)
    found = get_close_matches(wanted, same, 1) or same or get_close_matches(wanted, known, 1)
    return next(iter(found or get_close_matches(key, known, 1)), None)


# --- for a terminal -----------------------------------------------------------------------------------


def _lines(option: Option) -> Iterator[str]:
    yield f"{option.name}: {option.kind}"
    yield from _wrapped(option.about)
    if not option.inner:
        yield f"  default: {option.default}" if option.default else "  it must be given"
    if not option.inner or option.is_reloadable:
        yield "  a reload takes it over" if option.is_reloadable else "  a change needs a restart"
    for policy in option.policies:
        yield ""
        yield f"  {policy.name}"
        yield from _wrapped(policy.about, 4)
        for argument in policy.arguments:
            yield f"    {argument.key}: {argument.kind}; default {argument.default}"
            yield from _wrapped(argument.about, 6)
    if option.inner:
        yield ""
        yield from _rows((f"  {inner.key}", inner.about) for inner in option.inner)


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _rows(found: Iterator[tuple[str, str]]) -> Iterator[str]:
    rows = list(found)
    width = max(len(name) for name, _ in rows) + 2
    for name, about in rows:
        yield f"{name:{width}}{textwrap.shorten(about, WIDTH - width, placeholder=' ...')}"


# --- for the docs -------------------------------------------------------------------------------------


def _section(title: str, about: str, inner: Sequence[Option]) -> Iterator[str]:
    yield f"## {title}\n"
    if about:
        yield f"{about}\n"
    yield "| option | value | default | what it does | |"
    yield "|---|---|---|---|---|"
    yield from map(_row, inner)
    yield ""


def _row(option: Option) -> str:
    name = f"[`{option.key}`](#{_anchor(option.name)})" if option.inner else f"`{option.key}`"
    default = f"`{option.default}`" if option.default else "" if option.inner else "must be given"
    cells = (name, option.kind, default, option.about, "*" if option.is_reloadable else "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _anchor(name: str) -> str:
    """Return the anchor that GitHub gives the title of a section."""
    return re.sub(r"[^\w-]", "", name.lower())


def _policies(option: Option) -> Iterator[str]:
    yield f"## Policies of `{option.name}`\n"
    for policy in option.policies:
        yield f"`{policy.name}`: {policy.about}\n"
        if policy.arguments:
            yield "| argument | value | default | what it does | |"
            yield "|---|---|---|---|---|"
            yield from map(_row, policy.arguments)
            yield ""


if __name__ == "__main__":
    print(page(), end="")
