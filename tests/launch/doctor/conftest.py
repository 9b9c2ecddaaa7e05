from __future__ import annotations

from pathlib import Path

import pytest

from launch.doctor import workers
from tests.baton import ROOT
from tests.launch.doctor.visiting import Doctor


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    monkeypatch.chdir(tmp_path)
    for name in ("BATON_TRANSPORT", "BATON_STREAMS", "BATON_WORKER_API_KEY", "BATON_NIXL_PROGRESS_DELAY_US"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)  # the clocks here are right, or wrong by far
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what is started in another directory
    return Doctor(tmp_path, capsys)
