"""The mark `processes` cannot be forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

TESTS = Path(__file__).parent


def test_a_test_that_starts_processes_without_the_mark_fails() -> None:
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(TESTS / "unmarked_run.py")]
    said = subprocess.run(argv, cwd=TESTS.parent, capture_output=True, text=True, check=False).stdout
    assert said.count("\nit starts processes, and is not marked `processes`\n") == 3
    errors = [line for line in said.splitlines() if line.startswith("ERROR ")]
    assert [line.split(" - ")[0].rpartition("::test_")[2] for line in errors] == [
        "unmarked_with_one_that_has_ended",
        "unmarked_with_one_of_a_fixture",
        "unmarked_with_one_that_goes_on",
    ]
    assert "5 passed, 3 errors" in said
