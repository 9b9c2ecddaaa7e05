"""The live checks ask the workers of a config, as pairs too; those that do not run are started for that."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.asking import Client, Patient
from launch.doctor.case import Case
from launch.doctor.cluster import Limits, started
from launch.doctor.findings import Finding, Verdict, ok, warn
from launch.doctor.fits import check_fits, pairs_of
from launch.doctor.pairs import Pairs
from launch.doctor.static import KEEPS_FROM_STARTING
from launch.doctor.workers import check_front, examine_all
from launch.local.logs import make_run_directory
from launch.plan import ProcessSpec
from orchestrator.config.keys import worker_key
from orchestrator.config.options import ModelConfig
from orchestrator.legs.connectors import CONNECTORS

AT_ONCE = 16  # workers that are asked at the same time


@dataclass(frozen=True, slots=True)
class Visit:
    """How the workers are visited: what is said meanwhile, and the longest time for one answer."""

    say: Callable[[str], None]
    timeout_s: float


async def live_findings(case: Case, before: Sequence[Finding], visit: Visit) -> AsyncIterator[Finding]:
    """Yield findings as they come. `before` are the static ones. Workers that are started here end with it.

    Raises `OSError` if no directory for logs can be made, or no process that guards what is started.
    """
    wanted = [spec for spec in case.specs if spec.role != "orchestrator" and spec.name not in case.running]
    faults = [finding for finding in before if _keeps_from_starting(finding)]
    async with AsyncExitStack() as stack:
        absent = {spec.name for spec in wanted}
        if wanted and not faults:
            outcomes = await stack.enter_async_context(_start(case, wanted, visit))
            absent = {finding.subject for finding in outcomes if finding.verdict is Verdict.FAIL}
            for finding in outcomes:
                yield finding
        elif wanted:
            yield _not_started(wanted)
        client = await stack.enter_async_context(Client(worker_key(case.around.environ), visit.timeout_s))
        async for finding in _examined(case, client, absent):
            yield finding
        if case.plan is not None and case.plan.orchestrator.name in case.running:
            yield await check_front(case.plan)


def _keeps_from_starting(finding: Finding) -> bool:
    return finding.verdict is Verdict.FAIL and finding.check in KEEPS_FROM_STARTING


def _not_started(wanted: Sequence[ProcessSpec]) -> Finding:
    found = f"{len(wanted)} workers were not started, for what was found before"
    return warn("start", wanted[0].name, found, "mend that first, and run this again")


def _start(
    case: Case, wanted: Sequence[ProcessSpec], visit: Visit
) -> AbstractAsyncContextManager[list[Finding]]:
    directory = make_run_directory(os.environ, Path.cwd())
    limits = Limits(case.config.launch.start_timeout_s, case.config.launch.stop_timeout_s)
    return started(wanted, directory, limits, visit.say)


async def _examined(case: Case, client: Client, absent: set[str]) -> AsyncIterator[Finding]:
    patients = [
        Patient(address, place.pool.data_parallel_size)
        for place, address in case.workers()
        if address.name not in absent
    ]
    for finding in await examine_all(client, patients, AT_ONCE):
        yield finding
    for model in case.config.models:
        of_model = [patient for patient in patients if patient.address.model == model.name]
        for finding in check_fits(model.name, of_model):
            yield finding
        if case.config.routing.disaggregate != "never":
            within_revision = case.config.routing.keeps_revisions
            async for finding in _paired(model, client, of_model, within_revision=within_revision):
                yield finding


async def _paired(
    model: ModelConfig, client: Client, patients: Sequence[Patient], *, within_revision: bool
) -> AsyncIterator[Finding]:
    """Try the pairs of a model one after the other: their answers must not depend on each other's load."""
    connector = CONNECTORS[model.connector]
    parts = [part for patient in patients for part in patient.parts]
    pairs, count = pairs_of(parts, within_revision=within_revision)
    if pairs and connector.sends_both_at_once:
        found = f"pairs by the connector {model.connector} are not tried"
        yield warn("handoff", model.name, found, "send a request through `baton up`")
        return
    trial = Pairs(client, connector)
    for pair in pairs:
        for finding in await trial.check(*pair):
            yield finding
    if len(pairs) < count:
        yield ok(
            "handoff", model.name, f"of {count} pairs {len(pairs)} were tried, each worker in one at least"
        )
