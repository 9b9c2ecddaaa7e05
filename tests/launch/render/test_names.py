"""Names of objects are what Kubernetes takes, and differ where models do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.render.names import MAX_SHORT_SLUG, MAX_SLUG, slug

is_slug = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?").fullmatch


@pytest.mark.parametrize("name", ["qwen", "tiny-chat", "a", "qwen3-8b-instruct-2507"])
def test_a_plain_name_stays(name: str) -> None:
    assert slug(name) == name


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("Qwen/Qwen3-8B", "qwen-qwen3-8b-"),
        ("a.b", "a-b-"),
        ("-", "model-"),
        ("模型", "model-"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama-llam-"),
        ("a-3fa2b1c4", "a-3fa2b1c4-"),
    ],
)
def test_a_changed_name_ends_with_its_hash(name: str, begins: str) -> None:
    assert re.fullmatch(re.escape(begins) + "[0-9a-f]{8}", slug(name))


def test_names_that_look_alike_are_told_apart() -> None:
    names = ["a/b", "a-b", "a.b", "A-b", "a_b", "a--b", " a-b", "a-b-", slug("a/b"), "a" * 60, "a" * 61]
    assert len({slug(name) for name in names}) == len(names)


@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from([MAX_SLUG, MAX_SHORT_SLUG]))
def test_any_two_names(one: str, other: str, limit: int) -> None:
    found = slug(one, limit)
    assert is_slug(found)
    assert len(found) <= limit
    assert (found == slug(other, limit)) == (one == other)
    assert slug(found, limit) == found or found != one
