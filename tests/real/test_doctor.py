"""`baton doctor` finds nothing wrong with real vLLM that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.baton import ROOT, START_S
from tests.real.conftest import Cluster, assert_nothing_pinned


def doctor(folder: Path, config: Path, *options: str) -> dict[str, Any]:
    """What it says as JSON, without what it says of a busy machine. Its exit code must fit."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", str(config), "-o", "json", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == int(document["faults"] > 0)
    document["checks"] = [check for check in document["checks"] if check["check"] not in ("memory", "disk")]
    return document


def found(document: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [check for check in document["checks"] if check["verdict"] == verdict]


def test_a_cluster_that_runs_is_asked_as_it_is(cluster: Cluster) -> None:
    document = doctor(cluster.config.parent, cluster.config)
    assert found(document, "fail") == []
    assert "start" not in {check["check"] for check in document["checks"]}
    assert_nothing_pinned(cluster)
