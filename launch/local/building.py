"""The orchestrator's compiled form is built beside workers that start, if it is not there yet."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.local.logs import tail
from launch.local.processes import Guard, ProcessGroup, describe_exit
from launch.local.progress import Progress
from launch.plan import Plan, ProcessSpec
from orchestrator.config.printing import one_line
from orchestrator.form import BadBuild, build_folder, built, is_checkout, is_current_in_place, wished

NAME = "compiled form"


def build_spec(plan: Plan, environ: Mapping[str, str]) -> ProcessSpec | None:
    """Return what builds the compiled form; None if it is there, or nobody wants it. Raises `FormError`."""
    if not _is_needed(environ):
        return None
    return ProcessSpec(
        name=NAME,
        role="build",
        argv=(sys.executable, "-m", "launch.compile", "--while", str(os.getpid())),
        env=plan.orchestrator.env,
        ready_url="",
        listens=(),
        log_name="compile.log",
    )


def _is_needed(environ: Mapping[str, str]) -> bool:
    return wished(environ) != "pure" and is_checkout() and not _is_there(environ)


def _is_there(environ: Mapping[str, str]) -> bool:
    try:
        return is_current_in_place() or bool(built(build_folder(environ)))
    except BadBuild:
        return False


class Building:
    """A build is a process that ends by itself. The orchestrator waits for it as long as workers start."""

    def __init__(self, spec: ProcessSpec, log: Path, guard: Guard, progress: Progress) -> None:
        self._spec = spec
        self._log = log
        self._guard = guard
        self._progress = progress
        self._group: ProcessGroup | None = None
        self._is_awaited = True

    def start(self) -> None:
        """Start it; whoever does this calls `stop` in the end."""
        try:
            self._group = ProcessGroup(self._spec, self._log, self._guard)
            self._progress.set(NAME, "building")
        except OSError as error:
            self._progress.say(f"the compiled form cannot be built: {error}")

    def is_over(self) -> bool:
        """Tell whether it has ended, and say what came of it."""
        code = None if self._group is None else self._group.exit_code()
        if self._group is not None and code is not None:
            self._group.forget()
            self._group = None
            self._tell(code)
        return self._group is None

    def _tell(self, code: int) -> None:
        self._progress.set(NAME, "built" if code == 0 else "not built")
        if code != 0:
            said = " ".join(tail(self._log, 1)) or f"the compiled form is not built: {describe_exit(code)}"
            self._progress.say(one_line(said))
        elif not self._is_awaited:
            self._progress.say("the orchestrator takes its compiled form when it is started again")

    def may_be_left(self) -> bool:
        """Tell whether the orchestrator may start without it, now that all workers have started; say so."""
        if wished(os.environ) == "compiled":
            return False
        self._is_awaited = False
        self._progress.say("the orchestrator starts as pure Python: its compiled form is still being built")
        return True

    async def stop(self) -> None:
        """End it at once: what is not finished is of no use."""
        if self._group is not None:
            await self._group.end(0.0, asyncio.Event())
            self._group = None
