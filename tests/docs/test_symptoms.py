"""docs/troubleshooting.md has a test for each symptom, and quotes something of each."""

from __future__ import annotations

from tests.docs import test_troubleshooting, test_troubleshooting_processes
from tests.docs.symptoms import MADE, quoted

LEAST = 40


def test_each_symptom_is_made_by_a_test() -> None:
    assert test_troubleshooting is not test_troubleshooting_processes  # by their import all tests are known
    assert sorted(MADE) == sorted(quoted())
    assert len(MADE) >= LEAST


def test_each_symptom_quotes_something() -> None:
    assert [title for title, lines in quoted().items() if not lines] == []
    assert [
        line for lines in quoted().values() for line in lines if not line.replace("...", "").strip()
    ] == []
