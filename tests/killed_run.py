"""A test run that is killed in the middle; `test_reaper.py` starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.orchestrator.running import simulated, starting
from tests.waiting import wait_for

# Like vLLM's engine core: in a session of its own, without its parent, and under a name that it gives itself.
ENGINE_CORE = """
import sys, time
try:
    from setproctitle import setproctitle  # vLLM brings it along
    setproctitle("VLLM::EngineCore")
except ImportError:
    pass
open(sys.argv[1], "w").close()
time.sleep(600)
"""


def test_that_never_ends(tmp_path: Path) -> None:
    with simulated("prefill", "decode") as workers, starting(tmp_path, workers) as start:
        start(processes=2)
        start_engine_core(tmp_path / "core")
        started = Path(os.environ["BATON_TEST_STARTED"])
        started.with_suffix(".new").write_text(str(os.getpid()))
        started.with_suffix(".new").rename(started)
        time.sleep(600)


def start_engine_core(named: Path) -> None:
    argv = ["sh", "-c", 'setsid "$@" &', "sh", sys.executable, "-c", ENGINE_CORE, str(named)]
    subprocess.run(argv, check=True)
    wait_for(named.exists, "its name")
