from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench.shared.processes import ROOT, python

pytestmark = pytest.mark.processes

TINY = {"rounds": 2, "round-s": 0.001, "models": 3, "choices": 2, "vectors": 2, "dimensions": 4}


DOCUMENT_WAYS = {"pydantic model", "dict", "orjson", "bytes"}


def test_every_way_of_every_answer_is_measured(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = [f"--{name}={value}" for name, value in {**TINY, "json": result}.items()]
    argv = python("-m", "bench.micro.responses", *options)
    shown = subprocess.run(argv, check=True, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    rows = json.loads(result.read_text())["rows"]
    assert {(row["answer"], row["way"]) for row in rows} == {
        *(("listing of 3", way) for way in DOCUMENT_WAYS),
        *(("completion of 2", way) for way in DOCUMENT_WAYS),
        *(("embeddings 2 x 4", way) for way in DOCUMENT_WAYS | {"orjson and numpy"}),
    }
    assert all(len(row["cpu_ms"]) == 2 for row in rows)
    assert len({row["bytes"] for row in rows if row["answer"] == "listing of 3"}) == 1  # the same document
    assert len(shown) == 1 + len(rows)
