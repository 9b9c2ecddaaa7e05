"""A command of ours as a process that says when it is ready."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx

from bench.shared.processes import tree
from tests.waiting import wait_until_gone

ROOT = Path(__file__).resolve().parents[1]

# Limits, not expectations: a loaded machine with one core is as good as any.
START_S = 600.0
SETTLE_S = 60.0


@contextlib.contextmanager
def baton(*argv: str, cwd: Path, transport: str, ready_at: str | None = None) -> Iterator[str]:
    """Run a command of ours until the block ends. Yields the URL of its ready line, or of `ready_at`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *argv],
        cwd=cwd,
        env={**os.environ, "BATON_TRANSPORT": transport, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = _Output(process.stdout)
    try:
        yield _wait_until_ready(process, output, ready_at)
    finally:
        members = tree(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=SETTLE_S * 2) == 0, output.text()
        wait_until_gone(members, SETTLE_S)


class _Output:
    """Reads a child's output all the time, so that it never blocks on a full pipe."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._stream = stream
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._stream:
            for line in self._stream:
                self._lines.append(line)

    def text(self) -> str:
        return "".join(self._lines)

    def ready_url(self) -> str | None:
        lines = (line.strip() for line in list(self._lines))
        return next((line.removeprefix("ready: ") for line in lines if line.startswith("ready: ")), None)


def _wait_until_ready(process: subprocess.Popen[str], output: _Output, ready_at: str | None) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, output.text()
        if ready_at is None:
            if url := output.ready_url():
                return url
        else:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready_at).is_success:
                    return ready_at
        time.sleep(0.1)
    raise AssertionError(f"not ready within {START_S} s:\n{output.text()}")
