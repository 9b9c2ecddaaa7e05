from __future__ import annotations

import subprocess

import pytest

from bench.shared.processes import ROOT, python

pytestmark = pytest.mark.processes


def test_a_sample_of_all_numbers_comes_back_unchanged() -> None:
    argv = python("-m", "bench.embeddings.float_digits", "--every=10007", "--common-every=1009")
    shown = subprocess.run(argv, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.count(" 0 changed") == 2
