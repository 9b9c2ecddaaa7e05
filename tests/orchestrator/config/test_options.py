"""What holds for every option: it is described in a sentence, and marked if it may change while running."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pytest

from orchestrator.compiled import ROOT
from orchestrator.config.base import is_reloadable, model_in, options_of
from orchestrator.config.file import json_schema
from orchestrator.config.options import Config
from orchestrator.config.policies import PolicyConfig
from orchestrator.routing.policies import POLICIES

OPTIONS = dict(options_of(Config))
DESCRIPTIONS: dict[str, str] = {
    name: option.description or "" for name, option in (OPTIONS | dict(options_of(PolicyConfig))).items()
} | {
    f"{name}: {argument.name}": argument.description
    for name, spec in POLICIES.items()
    for argument in spec.arguments
}
# What options say of things. A new verb is welcome here; a description without any is no sentence.
VERBS = re.compile(
    r"\b(is|are|was|were|has|have|may|must|does|do|decides|chooses?|serves?|listens?|runs?|reads?|takes?|gets?|goes"
    r"|says?|bounds|describes|lists|holds?|waits?|puts?|loads|knows?|makes?|pins?|wins?|grows?|follows|resumes"
    r"|ends|computes|differs?|sends?|asks)\b"
)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_option_is_described_in_sentences(name: str) -> None:
    text = DESCRIPTIONS[name]
    assert text, "there is no description"
    for sentence in re.split(r"(?<=\.) ", text):
        assert sentence[0].isupper(), sentence
        assert sentence.endswith("."), sentence
        assert len(sentence.split()) >= 4, sentence
        assert VERBS.search(sentence), sentence


def descriptions_in(schema: Any) -> Iterator[str]:
    """Those of all properties, however deep."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for value in inner:
        yield from descriptions_in(value)
    if isinstance(schema, dict):
        yield from (option["description"] for option in schema.get("properties", {}).values())


def test_all_options_are_looked_at() -> None:
    """The schema has what the walk over the options finds, and the descriptions with it."""
    assert set(descriptions_in(json_schema())) == set(DESCRIPTIONS.values())


def test_names_are_those_of_the_file() -> None:
    assert {"base_port", "orchestrator", "orchestrator.limits.body_timeout_s"} <= OPTIONS.keys()
    assert {"models.*.prefill.urls", "models.*.both.workers.*.host"} <= OPTIONS.keys()


# --- what may change while running --------------------------------------------------------------


def marked(schema: dict[str, Any], definition: dict[str, Any], name: str = "") -> set[str]:
    """The options that the schema shows as reloadable, by name."""
    found: set[str] = set()
    for key, option in definition.get("properties", {}).items():
        if option.get("x-reloadable"):
            found.add(f"{name}{key}")
        inner = re.search(r"'#/\$defs/(\w+)'", str(option))
        if inner:
            section = f"{name}{key}.*." if "'array'" in str(option) else f"{name}{key}."
            found |= marked(schema, schema["$defs"][inner[1]], section)
    return found


def test_the_schema_shows_what_may_change() -> None:
    schema = json_schema()
    expected = {name for name, option in OPTIONS.items() if is_reloadable(option)}
    assert {"routing.prefill", "health.eject_s", "models.*.decode.urls"} <= expected
    assert marked(schema, schema) == expected


def rows() -> Iterator[str]:
    """The table of the docs: a line per section, with the options that may change and those that may not."""
    sections: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for name, option in OPTIONS.items():
        if model_in(option.annotation) is None or is_reloadable(option):
            section, _, key = re.sub(r"^models\.\*\.(prefill|decode|both)", "models.*.ROLE", name).rpartition(
                "."
            )
            columns = sections.setdefault(section, ({}, {}))
            columns[not is_reloadable(option)][key] = None
    for section, (live, fixed) in sections.items():
        title = f"`{section}`" if section else "the file"
        yield f"| {title} | {named(live, fixed)} | {named(fixed, live)} |"


def named(options: Iterable[str], others: Collection[str]) -> str:
    return ", ".join(f"`{option}`" for option in options) if others else "all" if options else "none"


def test_the_docs_say_what_may_change() -> None:
    lines = (ROOT / "docs/structure.md").read_text().splitlines()
    start = lines.index("| section | may change | needs a restart |") + 2
    expected = [*rows()]
    assert lines[start : start + len(expected)] == expected
    assert not lines[start + len(expected)].startswith("|")
