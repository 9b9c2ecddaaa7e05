from __future__ import annotations

from typing import Any

import pytest

from orchestrator.wire.compatibility import ADVICE, differences, lacks_connector, revision_of
from orchestrator.wire.info import WorkerInfo


def info(**fields: Any) -> WorkerInfo:
    given = {"role": "decode", "model": "m", "decodes": ["json"], "engine": "vllm", "engine_version": "1"}
    return WorkerInfo(**given | fields)


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("path", "org/a", "org/b"),
        ("engine", "vllm", "sim"),
        ("dtype", "bfloat16", "float32"),
        ("kv_dtype", "auto", "fp8"),
        ("block_size", 16, 32),
        ("connector", "NixlConnector", "LMCacheConnectorV1"),
        ("tp", 2, 3),
    ],
)
def test_each_field_that_must_agree_is_named_with_what_to_do(field: str, one: object, other: object) -> None:
    (found,) = differences(info(**{field: one}), info(**{field: other}))
    assert (found.field, found.mine, found.theirs, found.advice) == (field, one, other, ADVICE[field])


def test_all_differences_are_found_at_once() -> None:
    found = differences(info(dtype="a", block_size=1), info(dtype="b", block_size=2))
    assert [difference.field for difference in found] == ["dtype", "block_size"]


@pytest.mark.parametrize(("one", "other"), [(1, 1), (1, 8), (4, 2), (8, 8)])
def test_tensor_parallel_sizes_may_differ_if_one_divides_the_other(one: int, other: int) -> None:
    assert differences(info(tp=one), info(tp=other)) == ()


def test_a_tensor_parallel_size_of_nothing_fits_none() -> None:
    assert [found.field for found in differences(info(tp=0), info(tp=2))] == ["tp"]


def test_what_one_does_not_say_fits() -> None:
    assert differences(info(dtype="bfloat16", block_size=16, tp=3), info()) == ()


def test_revisions_may_differ() -> None:
    assert differences(info(revision="a"), info(revision="b")) == ()


def test_versions_of_engines_may_differ_where_pairs_are_kept_within_one() -> None:
    one, other = info(engine_version="1"), info(engine_version="2")
    assert [difference.field for difference in differences(one, other)] == ["engine_version"]
    assert differences(one, other, within_revision=True) == ()


def test_a_revision_has_the_models_and_the_engines_version() -> None:
    assert revision_of(None) is None
    found = {revision_of(info(revision=r, engine_version=v)) for r in ("a", "b", None) for v in ("1", "2")}
    assert len(found) == 6


def test_a_worker_may_say_that_it_has_no_connector() -> None:
    assert [lacks_connector(info(connector=name)) for name in (None, "NixlConnector", "none")] == [
        False,
        False,
        True,
    ]
