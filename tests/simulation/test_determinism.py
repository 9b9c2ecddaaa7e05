"""A seed says everything: not the process, its hash seed, or what ran before."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from tests.simulation.simulate import simulate

SEEDS = range(60)


def fingerprint() -> str:
    digest = hashlib.sha256()
    for seed in SEEDS:
        digest.update("\n".join(map(str, simulate(seed).trace)).encode())
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_trace() -> None:
    assert fingerprint() == fingerprint()


@pytest.mark.processes
def test_also_in_other_processes() -> None:
    program = "from tests.simulation.test_determinism import fingerprint; print(fingerprint())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == fingerprint() + "\n"


def test_different_seeds_are_different() -> None:
    assert len({str(simulate(seed).trace) for seed in SEEDS}) == len(SEEDS)
