from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parents[2] / "bench/float_digits.py"


def test_a_sample_of_all_numbers_comes_back_unchanged() -> None:
    argv = [sys.executable, str(SCRIPT), "--every=10007", "--common-every=1009"]
    shown = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert shown.count(" 0 changed") == 2
