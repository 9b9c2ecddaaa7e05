"""wrk (https://github.com/wg/wrk) makes load: connections that each have one request at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.shared.processes import Failed, last_line

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT_S = 60  # wrk's own 2 s would call a slow router's streams an error


@dataclass(frozen=True)
class Load:
    """wrk saw this. The latencies are NaN if no request came to its end."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float


def lacks() -> str | None:
    """Say why there can be no load from wrk, or return None."""
    return None if shutil.which("wrk") else "wrk is not installed (Debian: apt-get install wrk)"


def run(url: str, body: bytes, *, connections: int, seconds: int, keep_alive: bool = True) -> Load:
    """POST the body for a time; raises `Failed` if any request failed."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
        command += ["--timeout", f"{TIMEOUT_S}s", "--script", str(SCRIPT), url]
        connection = "keep-alive" if keep_alive else "close"
        env = {**os.environ, "WRK_BODY": file.name, "WRK_CONNECTION": connection}
        ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return parse(ended.stdout + ended.stderr)


def parse(output: str) -> Load:
    """Read the line that wrk.lua prints; raises `Failed` if there is none, or if it counts errors."""
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        raise Failed(f"wrk: {last_line(output)}")
    result = json.loads(line)
    if failures := _failures(result["errors"]):
        raise Failed(f"{failures}, of {result['requests']} requests")
    answered = result["requests"] > 0
    return Load(
        requests=result["requests"],
        seconds=result["duration_us"] / 1e6,
        p50_ms=result["p50_us"] / 1e3 if answered else math.nan,
        p99_ms=result["p99_us"] / 1e3 if answered else math.nan,
    )


def _failures(errors: dict[str, int]) -> str:
    """Write `3 connect errors, 5 status errors`, or nothing."""
    return ", ".join(f"{count} {kind} errors" for kind, count in errors.items() if count)
