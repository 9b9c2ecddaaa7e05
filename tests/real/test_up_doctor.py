"""`baton doctor` starts real vLLM, finds nothing wrong with it, and stops it."""

from __future__ import annotations

from pathlib import Path

from tests.baton import ROOT
from tests.real.conftest import Stage, free_base
from tests.real.test_doctor import doctor, found


def test_the_quickstart_is_well(stage: Stage, tmp_path: Path) -> None:
    stage.clear()
    base = free_base()
    sets = [f"base_port={base}", f"orchestrator.listen=127.0.0.1:{base + 10}", "orchestrator.admin=null"]
    options = [part for one in sets for part in ("--set", one)]
    document = doctor(tmp_path, ROOT / "configs/quickstart.yaml", *options)
    assert found(document, "fail") == found(document, "warn") == []
    said = {check["check"]: check["found"] for check in document["checks"]}
    assert said["fits"].startswith("2 workers agree: path ")
    assert "connector NixlConnector" in said["fits"]
    assert said["handoff"].startswith("the KV cache of ")
    assert said["equal"] == "answers 3 prompts as tiny-chat/decode/0 does alone"
    assert "revision files:" in said["announces"]
