"""The command `baton bench`: from its options to a report and an exit code."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from launch.bench import ab, compare, plot, report
from launch.bench.client import Client
from launch.bench.endpoint import Endpoint, authorization
from launch.bench.errors import BenchError, WrongUsage
from launch.bench.options import PROFILES as DEFAULTS
from launch.bench.options import STUDIES, STUDY
from launch.bench.probe import Target, probe
from launch.bench.profiles import PROFILES, Plan
from launch.bench.progress import ProgressLine
from launch.bench.prompts import Corpus
from launch.bench.results import AB_FORMAT, FORMAT, AbResult, Result, Setup, Step, load, save
from launch.bench.sample import Slo
from launch.bench.session import Session
from launch.bench.shapes import WORKLOADS, Workload
from launch.exits import Exit
from orchestrator.transport.base import Upstream
from orchestrator.transport.pool import PooledUpstream


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code. The report goes to stdout, everything else to stderr."""
    try:
        return _run(arguments)
    except BenchError as error:
        print(f"baton bench: {error}", file=sys.stderr)
        return error.exit
    except KeyboardInterrupt:
        print("baton bench: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        return _compare(arguments)
    for path in filter(None, (arguments.output, arguments.plot)):
        if not Path(path).absolute().parent.is_dir():
            raise WrongUsage(f"{path}: there is no such directory")
    if arguments.plot:
        plot.check(arguments.plot)
    bench = _Bench(arguments)
    if arguments.ab:
        return _run_loop(bench.run_ab(_arms(arguments.urls, arguments.cacert)))
    if len(arguments.urls) != 1:
        raise WrongUsage("one URL is needed, such as http://127.0.0.1:8000")
    return _run_loop(bench.run_profile(Endpoint.parse(arguments.urls[0], arguments.cacert)))


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.urls or arguments.output or arguments.plot:
        raise WrongUsage("--compare takes two files, and nothing else")
    a, b = map(load, arguments.compare)
    rows = list(compare.compare(a, b))
    if not rows:
        raise BenchError("the two results have no step in common")
    print(report.report_comparison(rows, compare.differences(a, b)))
    return Exit.OK


def _arms(arguments: Iterable[str], cacert: str | None) -> dict[str, Endpoint]:
    arms: dict[str, Endpoint] = {}
    for argument in arguments:
        label, equals, url = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", label) or label in arms:
            raise WrongUsage(f"{argument!r}: --ab takes LABEL=URL, with labels that differ")
        arms[label] = Endpoint.parse(url, cacert)
    if len(arms) < 2:
        raise WrongUsage("--ab needs two endpoints or more, as LABEL=URL")
    return arms


class _Bench:
    """The options, and what they make."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises `WrongUsage`."""
        self._arguments = arguments
        self._headers = authorization(os.environ)
        self._seed = str(arguments.seed)
        self._salt = arguments.salt or secrets.token_hex(4)
        self._slo = Slo(arguments.slo_ttft_ms, arguments.slo_itl_ms, arguments.slo_share)
        self._corpus = Corpus(Random(arguments.seed))  # noqa: S311  # words, no secrets
        self._progress = ProgressLine(sys.stderr)

    # --- one endpoint ---------------------------------------------------------------------------

    async def run_profile(self, endpoint: Endpoint) -> int:
        profile: str = self._arguments.profile
        async with _upstream() as upstream:
            session = self._session(upstream, endpoint, await self._probe(upstream, endpoint))
            defaults = DEFAULTS[profile]
            plan = self._plan(session.target, defaults.workloads, defaults.duration_s)
            exit_code = await self._measure(PROFILES[profile](session, plan))
        if not session.steps:
            return exit_code
        result = self._result(endpoint, session)
        self._show(result, report.report(result))
        return exit_code or _judge(result.steps)

    async def _measure(self, profile: Coroutine[Any, Any, None]) -> Exit:
        """What was found before Ctrl-C, or before the endpoint went, is still worth a report."""
        try:
            async with self._progress.shown():
                await profile
        except BenchError as error:
            self._progress.say(f"baton bench: {error}")
            return error.exit
        except asyncio.CancelledError:
            self._progress.say("baton bench: interrupted")
            return Exit.INTERRUPTED
        return Exit.OK

    def _result(self, endpoint: Endpoint, session: Session) -> Result:
        return Result(
            format=FORMAT,
            created=_now(),
            url=endpoint.url,
            salt=self._salt,
            setup=self._setup(self._arguments.profile, session.target),
            steps=session.steps,
            sustained=session.sustained,
        )

    # --- several endpoints ----------------------------------------------------------------------

    async def run_ab(self, endpoints: dict[str, Endpoint]) -> int:
        study, rounds = self._arguments.ab, self._arguments.rounds
        async with _upstream() as upstream:
            target = await self._probe_all(upstream, endpoints)
            arms = {
                label: self._session(upstream, endpoint, target, label)
                for label, endpoint in endpoints.items()
            }
            plan = self._plan(target, STUDIES[study], STUDY.duration_s)
            async with self._progress.shown():
                steps = await ab.run_rounds(arms, plan, rounds, self._seed)
        result = AbResult(
            format=AB_FORMAT,
            created=_now(),
            study=study,
            salt=self._salt,
            arms={label: endpoint.url for label, endpoint in endpoints.items()},
            setup=self._setup(f"ab {study}", target),
            rounds=rounds,
            ratios=ab.ratios(steps),
            steps=steps,
        )
        self._show(result, report.report_ab(result))
        return _judge(step for arm in steps.values() for step in arm)

    async def _probe_all(self, upstream: Upstream, endpoints: dict[str, Endpoint]) -> Target:
        """All are asked as the first one wants it. Raises `WrongUsage` if their models differ."""
        first, *others = [await self._probe(upstream, endpoint) for endpoint in endpoints.values()]
        for other in others:
            if other.model != first.model:
                raise WrongUsage(f"the endpoints serve different models: {first.model} and {other.model}")
        return first

    # --- both -----------------------------------------------------------------------------------

    async def _probe(self, upstream: Upstream, endpoint: Endpoint) -> Target:
        client = self._client(upstream, endpoint)
        return await probe(client, self._arguments.model, self._corpus)

    def _client(self, upstream: Upstream, endpoint: Endpoint) -> Client:
        return Client(upstream, endpoint, self._headers, self._arguments.timeout)

    def _session(self, upstream: Upstream, endpoint: Endpoint, target: Target, label: str = "") -> Session:
        """`label` keeps the texts of two sessions apart, should one endpoint be behind both."""
        client = self._client(upstream, endpoint)
        return Session(
            client,
            target,
            self._corpus,
            self._slo,
            self._progress,
            seed=self._seed,
            salt=f"{self._salt}/{label}",
        )

    def _plan(self, target: Target, workloads: Iterable[str], duration_s: float) -> Plan:
        names = self._arguments.workload or workloads
        return Plan(
            workloads=self._fitting(target, [WORKLOADS[name] for name in names]),
            rate=self._arguments.rate,
            duration_s=self._arguments.duration or duration_s,
            concurrency=self._arguments.concurrency,
            slo=self._slo,
        )

    def _fitting(self, target: Target, workloads: list[Workload]) -> list[Workload]:
        """Those that the model has room for."""
        for workload in workloads:
            if not target.takes(workload):
                room = f"it needs {workload.longest} tokens, {target.model} takes {target.longest}"
                self._progress.say(f"{workload.name} left out: {room}")
        fitting = list(filter(target.takes, workloads))
        if not fitting:
            raise WrongUsage("no workload is left")
        return fitting

    def _setup(self, profile: str, target: Target) -> Setup:
        return Setup(
            model=target.model,
            profile=profile,
            seed=self._arguments.seed,
            slo=self._slo,
            tokens_per_word=target.tokens_per_word,
            fixed_length=target.has_fixed_length,
        )

    def _show(self, result: Result | AbResult, text: str) -> None:
        print(text)
        if self._arguments.output:
            save(result, self._arguments.output)
        if self._arguments.plot:
            plot.plot(result, self._arguments.plot)


def _judge(steps: Iterable[Step]) -> Exit:
    """Raises `BenchError` if nothing was measured."""
    if not any(step.ok for step in steps):
        raise BenchError("not one request was answered")
    return Exit.OK


@contextlib.asynccontextmanager
async def _upstream() -> AsyncIterator[Upstream]:
    upstream = PooledUpstream()
    try:
        yield upstream
    finally:
        await upstream.aclose()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
