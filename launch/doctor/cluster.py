"""Workers that do not run yet are started for the doctor's visit, and stopped after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from launch.doctor.findings import Finding, fail, ok
from launch.local.logs import likely_cause, tail
from launch.local.processes import Guard, ProcessGroup, describe_exit
from launch.plan import ProcessSpec

POLL_S = 0.2
_LINES = 200  # of a log, in which its cause is looked for
_SHOWN = 160  # characters of its last line


@dataclass(frozen=True, slots=True)
class Limits:
    """In seconds."""

    start_s: float
    stop_s: float  # from SIGTERM to SIGKILL


@asynccontextmanager
async def started(
    specs: Sequence[ProcessSpec], directory: Path, limits: Limits, say: Callable[[str], None]
) -> AsyncIterator[list[Finding]]:
    """Start processes and yield, once each is up, has ended, or is late, what became of them.

    They are stopped at the end of the block, however it ends.
    """
    with Guard() as guard:
        visits = [_Visit(spec, directory / spec.log_name) for spec in specs]
        try:
            async with httpx.AsyncClient(timeout=limits.start_s, trust_env=False) as client:
                for visit in visits:
                    say(f"starting {visit.spec.name} (log: {visit.log})")
                    visit.start(guard)
                yield list(await asyncio.gather(*(visit.wait(client, limits.start_s) for visit in visits)))
        finally:
            hurry = asyncio.Event()
            await asyncio.gather(*(visit.stop(limits.stop_s, hurry) for visit in visits))


class _Visit:
    """One process, for the time of the visit."""

    def __init__(self, spec: ProcessSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self._group: ProcessGroup | None = None
        self._error = ""

    def start(self, guard: Guard) -> None:
        try:
            self._group = ProcessGroup(self.spec, self.log, guard)
        except OSError as error:
            self._error = str(error)

    async def wait(self, client: httpx.AsyncClient, limit_s: float) -> Finding:
        """Return what became of the start."""
        if self._group is None:
            return fail(
                "start", self.spec.name, f"cannot be started: {self._error}", "see the system's message"
            )
        try:
            async with asyncio.timeout(limit_s):
                return await self._outcome(self._group, client)
        except TimeoutError:
            advice = f"{self._cause(None)} (log: {self.log}); launch.start_timeout_s is the limit"
            return fail("start", self.spec.name, f"is not ready after {limit_s:g} s", advice)

    async def _outcome(self, group: ProcessGroup, client: httpx.AsyncClient) -> Finding:
        while not await self._is_ready(client):
            code = group.exit_code()
            if code is not None:
                found = f"ended while starting, with {describe_exit(code)}"
                return fail("start", self.spec.name, found, f"{self._cause(code)} (log: {self.log})")
            await asyncio.sleep(POLL_S)
        return ok("start", self.spec.name, "was started for this visit")

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(self.spec.ready_url)).status_code == 200
        except httpx.HTTPError:
            return False

    def _cause(self, code: int | None) -> str:
        lines = tail(self.log, _LINES)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return likely_cause(lines, code) or f"its last line is {last[:_SHOWN]!r}"

    async def stop(self, limit_s: float, hurry: asyncio.Event) -> None:
        if self._group is not None:
            await self._group.end(limit_s, hurry)
