"""`baton up` for stand-ins: runs `supervise` on a plan that a test wrote to a JSON file."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.backends.base import BackendError
from launch.backends.local import Local
from launch.local import building
from launch.local.member import Limits
from launch.local.output import Output
from launch.local.progress import make_progress
from launch.local.run_state import StateWriter
from launch.local.supervise import Site, supervise
from launch.plan import Plan, ProcessSpec


def main() -> int:
    document = json.loads(Path(sys.argv[1]).read_text())
    specs = [_spec(process) for process in document["processes"]]
    build = None if document["build"] is None else _build(document["build"])
    plan = Plan(tuple(specs[:-1]), specs[-1], (), document["url"], build=build)
    directory = Path(document["directory"])
    started = specs if build is None else [*specs, build]
    progress = make_progress(
        Output(sys.stderr), {spec.name: str(directory / spec.log_name) for spec in started}
    )
    limits = Limits(**document["limits"])
    writer = StateWriter(directory, "stand-ins.yaml", plan.url, plan.admins, progress.say)
    announce = lambda: print("ready", flush=True)  # noqa: E731
    backend = Leaving if document["leaves"] else Local
    return asyncio.run(supervise(plan, Site(directory, limits, progress, writer, backend=backend), announce))


class Leaving(Local):
    """A backend that cannot end the workers that it has."""

    @property
    def handle(self) -> Mapping[str, str]:
        return {"somewhere": "far"}

    async def close(self) -> None:
        raise BackendError("the cluster does not answer")


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


def _build(code: str) -> ProcessSpec:
    return ProcessSpec(
        name=building.NAME,
        role="build",
        argv=(sys.executable, "-c", code),
        env={},
        ready_url="",
        listens=(),
        log_name="compile.log",
    )


if __name__ == "__main__":
    sys.exit(main())
