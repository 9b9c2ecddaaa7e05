"""A test run that is killed in the middle; `test_reaper.py` starts it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.orchestrator.running import simulated, starting


def test_that_never_ends(tmp_path: Path) -> None:
    with simulated("prefill", "decode") as workers, starting(tmp_path, workers) as start:
        start(processes=2)
        subprocess.run(["sh", "-c", "setsid sleep 600 &"], check=True)  # its parent ends first
        started = Path(os.environ["BATON_TEST_STARTED"])
        started.with_suffix(".new").write_text(str(os.getpid()))
        started.with_suffix(".new").rename(started)
        time.sleep(600)
