"""Prometheus and its tool, where `make monitoring` or the machine has put them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.compiled import ROOT


def program(name: str) -> str:
    own = ROOT / ".prometheus/usr/bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"there is no {name}: `make monitoring` fetches it and runs these tests")
    return found


def promtool(*argv: str, stdin: str = "", cwd: Path | None = None) -> str:
    """Run it; returns what it says. Fails the test if it finds anything."""
    done = subprocess.run(
        [program("promtool"), *argv], input=stdin, capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
