"""A result says what it was measured on: without that its figures mean little."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.shared.processes import ROOT

RESULTS = ROOT / "bench/results"


def dated(name: str) -> Path:
    """Return where a result goes if nothing else is said."""
    return RESULTS / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"


def about(packages: Iterable[str]) -> dict[str, Any]:
    """Return what every result begins with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(packages),
    }


def machine() -> dict[str, str | int]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a table, if there is a path for them."""
    if path is not None:
        write(path, {"machine": machine(), "rows": rows})


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
