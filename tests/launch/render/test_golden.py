"""What is rendered of two configs is as it was: see `golden/__init__.py` for how it is changed."""

from __future__ import annotations

import pytest
import yaml

from launch.render.secrets import needed_secrets
from tests.launch.render.clusters import all_of
from tests.launch.render.golden.files import NAMES, cluster, expected, made
from tests.launch.render.structure import faults


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_as_they_were(name: str) -> None:
    files, wanted = made(name), expected(name)
    assert sorted(files) == sorted(wanted)
    for file, text in files.items():
        assert text == wanted[file], f"{name}/{file}"


@pytest.mark.parametrize("name", NAMES)
def test_they_fit_together(name: str) -> None:
    needed = {secret.name for secret in needed_secrets(cluster(name))}
    assert faults(list(all_of(cluster(name))), needed) == []


@pytest.mark.parametrize("name", NAMES)
def test_they_are_valid(name: str) -> None:
    pytest.importorskip("kubernetes_validate")
    from tests.launch.render.schemas import problems

    files = made(name, "kubernetes")
    objects = [
        one for file, text in files.items() if file.endswith(".yaml") for one in yaml.safe_load_all(text)
    ]
    assert [text for one in objects for text in problems(one)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_page_names_every_secret(name: str) -> None:
    page = made(name)["README.md"]
    for secret in needed_secrets(cluster(name)):
        assert f" {secret.name} " in page
