"""`baton doctor` prints what it finds, line by line or as JSON, and its exit code tells of faults."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from launch.doctor.case import Case
from launch.doctor.discovered import with_discovered
from launch.doctor.findings import Finding, Verdict, count, document, fail, summary
from launch.doctor.live import Visit, live_findings
from launch.doctor.network import running
from launch.doctor.software import installed_here
from launch.doctor.static import static_findings
from launch.engines.base import PlanError
from launch.exits import Exit
from launch.local.processes import NoGuard
from launch.plan import make_plan
from launch.surroundings import look_around
from orchestrator.config.checks import environment_fault
from orchestrator.config.keys import worker_key
from orchestrator.config.options import Config
from orchestrator.config.printing import one_line
from orchestrator.errors import SettingError
from orchestrator.wire.info import NIXL_DELAY_ENV, WORKER_KEY_ENV


def run(arguments: argparse.Namespace, config: Config) -> Exit:
    """Examine a config. Findings go to stdout, progress to stderr."""
    report = _Report(arguments.output)
    try:
        _examine(arguments, config, report)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return Exit.INTERRUPTED
    report.end()
    return Exit.FAILED if count(report.findings, Verdict.FAIL) else Exit.OK


class _Report:
    """Findings are shown as they come, or all at the end as JSON."""

    def __init__(self, form: str) -> None:
        self.findings: list[Finding] = []
        self._is_json = form == "json"

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        if not self._is_json:
            print(finding.line(), flush=True)

    def end(self) -> None:
        print(document(self.findings) if self._is_json else summary(self.findings), flush=True)


def _examine(arguments: argparse.Namespace, config: Config, report: _Report) -> None:
    if not arguments.static:
        config = with_discovered(config, arguments.timeout_s, report.add)
    case = _case(arguments, config, report.add)
    for finding in static_findings(case, installed_here()):
        report.add(finding)
    if not arguments.static:
        visit = Visit(lambda line: print(one_line(line), file=sys.stderr, flush=True), arguments.timeout_s)
        asyncio.run(_visit(case, visit, report))


def _case(arguments: argparse.Namespace, config: Config, add: Callable[[Finding], None]) -> Case:
    """Return the case, without its plan if that cannot be carried out."""
    around = look_around(_sound_environment(os.environ, add))
    around = replace(around, is_here=cache(around.is_here))  # asked for each worker by many checks
    case = Case(config, around, None)
    try:
        case = replace(case, plan=make_plan(config, arguments.config, arguments.overrides, around))
    except PlanError as error:
        add(
            fail(
                "plan", arguments.config, str(error), "correct the config, or run this where it is meant for"
            )
        )
    return replace(case, running=running(case.plan))


def _sound_environment(environ: Mapping[str, str], add: Callable[[Finding], None]) -> Mapping[str, str]:
    """Return the environment without what is wrong in it, which is told."""
    sound = dict(environ)
    while (fault := environment_fault(sound)) is not None:
        name, why = fault
        del sound[name]
        add(fail("nixl" if name == NIXL_DELAY_ENV else "transport", name, why, "correct it, or unset it"))
    try:
        worker_key(sound)
    except SettingError as error:
        del sound[WORKER_KEY_ENV]
        add(fail("key", WORKER_KEY_ENV, str(error), "correct it: workers and orchestrator need the same"))
    return sound


async def _visit(case: Case, visit: Visit, report: _Report) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async for finding in live_findings(case, tuple(report.findings), visit):
            report.add(finding)
    except NoGuard as error:
        report.add(fail("start", ".", str(error), "see the system's message"))
    except OSError as error:
        advice = "start this in a directory that can be written"
        report.add(fail("disk", ".", f"no directory for logs can be made: {error}", advice))
