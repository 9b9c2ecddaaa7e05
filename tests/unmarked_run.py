"""Tests with and without processes, and the mark; `test_marks.py` runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture
def living() -> Iterator[None]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield
        process.kill()


@pytest.fixture(scope="module")
def shared() -> Iterator[None]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield
        process.kill()


def test_unmarked_with_one_that_has_ended() -> None:
    subprocess.run(["true"], check=True)


@pytest.mark.usefixtures("living")
def test_unmarked_with_one_of_a_fixture() -> None:
    pass


@pytest.mark.usefixtures("shared")
def test_unmarked_with_one_that_goes_on() -> None:
    pass


@pytest.mark.processes
def test_marked() -> None:
    subprocess.run(["true"], check=True)


def test_without() -> None:
    pass
