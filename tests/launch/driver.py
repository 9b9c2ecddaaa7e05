"""`baton up` for stand-ins: runs `supervise` on a plan that a test wrote to a JSON file."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from launch.local.member import Limits
from launch.local.progress import make_progress
from launch.local.run_state import StateWriter
from launch.local.supervise import supervise
from launch.plan import Plan, ProcessSpec


def main() -> int:
    document = json.loads(Path(sys.argv[1]).read_text())
    specs = [_spec(process) for process in document["processes"]]
    plan = Plan(tuple(specs[:-1]), specs[-1], (), document["url"])
    directory = Path(document["directory"])
    progress = make_progress(sys.stderr, {spec.name: str(directory / spec.log_name) for spec in specs})
    limits = Limits(**document["limits"])
    writer = StateWriter(directory, "stand-ins.yaml", plan.url, plan.admin, progress.say)
    announce = lambda: print("ready", flush=True)  # noqa: E731
    return asyncio.run(supervise(plan, directory, limits, progress, writer, announce))


def _spec(process: dict[str, Any]) -> ProcessSpec:
    name = process["name"]
    return ProcessSpec(
        name=name,
        role="orchestrator" if name == "orchestrator" else "both",
        argv=(sys.executable, *process["argv"]),
        env={},
        ready_url=f"http://127.0.0.1:{process['port']}/health",
        listens=(("127.0.0.1", process["port"]),),
        log_name=f"{name}.log",
    )


if __name__ == "__main__":
    sys.exit(main())
