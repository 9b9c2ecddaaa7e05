from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench.shared.processes import ROOT, python

pytestmark = pytest.mark.processes

TINY = {"rounds": 2, "requests": 1, "vectors": 3, "dimensions": 8}


def test_every_form_is_measured_from_end_to_end(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = [f"--{name}={value}" for name, value in {**TINY, "json": result}.items()]
    subprocess.run(python("-m", "bench.embeddings", *options), check=True, cwd=ROOT)
    rows = {row["form"]: row for row in json.loads(result.read_text())["rows"]}
    assert rows.keys() == {"floats, untouched", "floats", "base64", "raw", "bytes"}
    assert all(len(row["rounds"]) == 2 for row in rows.values())
    assert rows["raw"]["bytes_to_client"] == rows["bytes"]["bytes_to_client"] == 3 * 8 * 4
    assert rows["floats"]["bytes_to_client"] == rows["floats, untouched"]["bytes_to_client"]
