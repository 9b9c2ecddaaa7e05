from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.baton import ROOT

TINY = {"rounds": 2, "vectors": 3, "dimensions": 8}


def test_the_benchmark_measures_every_form_that_vllm_has(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = [f"--{name}={value}" for name, value in {**TINY, "json": result}.items()]
    subprocess.run([sys.executable, "-m", "bench.embeddings.forms", *options], check=True, cwd=ROOT)
    rows = {row["form"]: row for row in json.loads(result.read_text())["rows"]}
    assert all(len(row["cpu_ms"]) == 2 for row in rows.values())
    assert rows["bytes"]["bytes"] == rows["bytes_only"]["bytes"] == 3 * 8 * 4
    assert rows["base64, orjson"]["bytes"] == rows["base64, json"]["bytes"]
    assert rows["bytes"]["messages"] > rows["base64, orjson"]["messages"]
