"""`up` starts everything, waits until it is ready, keeps it running, and stops it in reverse."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from launch.exits import Exit
from launch.local.building import Building
from launch.local.logs import likely_cause, tail
from launch.local.processes import Guard, ProcessGroup, describe_exit
from launch.local.progress import Progress
from launch.local.upkeep import LEAST_FREE, Upkeep, free_bytes, no_space
from launch.plan import Plan, ProcessSpec
from orchestrator.config.printing import masked, one_line
from orchestrator.loop.signals import on_hangup

POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0
SHOWN_LINES = 20
EXPLAIN_AFTER_S = 5.0  # the orchestrator needs a moment to find its workers
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Limits:
    """Starts and stops have these limits, in seconds."""

    start_s: float = 1800.0  # until everything must be ready
    stop_worker_s: float = 15.0  # from SIGTERM to SIGKILL
    stop_orchestrator_s: float = 35.0  # it drains meanwhile
    first_delay_s: float = 1.0  # before a process that died is started again
    longest_delay_s: float = 30.0
    stable_s: float = 60.0  # after so long a run the next delay is the first again
    log_bytes: int = 0  # a larger log is rotated; 0: none is
    log_files: int = 4  # that are kept of each


class StartFailed(Exception):
    """A process could not be started: the message says for the user which, why, and its last lines."""


class GuardGone(Exception):
    """The guard has ended: without it nothing would stop the processes if `up` were killed."""


class Stop:
    """The user asks for this by signals: the first stops in order, the second at once."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.hurry = asyncio.Event()

    def request(self) -> None:
        (self.hurry if self.requested.is_set() else self.requested).set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.request)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)


async def supervise(
    plan: Plan, run_directory: Path, limits: Limits, progress: Progress, announce: Callable[[], None]
) -> Exit:
    """Run the plan until a signal; SIGHUP has the orchestrator reload its config instead.

    `announce` is called once, when all is ready. No process is left after.
    """
    stop = Stop()
    with stop.on_signals(), Guard() as guard:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False) as client:  # noqa: S501  # our own children
            cluster = _Cluster(plan, run_directory, limits, progress, guard, client)
            try:
                with on_hangup(cluster.reload, stop.request):
                    return await _until_stopped(cluster, stop, announce)
            finally:
                await cluster.stop(stop.hurry)


async def _until_stopped(cluster: _Cluster, stop: Stop, announce: Callable[[], None]) -> Exit:
    running = asyncio.create_task(cluster.run(announce))
    stopping = asyncio.create_task(stop.requested.wait())
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        return Exit.OK if cluster.is_ready else Exit.INTERRUPTED
    except StartFailed as error:
        cluster.progress.say(str(error))
        return Exit.START_FAILED
    except GuardGone:
        cluster.progress.say("the guard process has ended: everything is stopped, for safety")
        return Exit.FAILED
    finally:
        running.cancel()
        stopping.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)


class _Cluster:
    """A cluster has all processes of the plan. Only `run` and, after it has ended, `stop` touch them."""

    def __init__(
        self,
        plan: Plan,
        run_directory: Path,
        limits: Limits,
        progress: Progress,
        guard: Guard,
        client: httpx.AsyncClient,
    ) -> None:
        self._url = plan.url
        self._limits = limits
        self.progress = progress
        self._guard = guard
        self._client = client
        self._members = [
            _Member(spec, run_directory / spec.log_name, limits, progress, guard) for spec in plan.processes
        ]
        self._building = (
            Building(plan.build, run_directory / plan.build.log_name, guard, progress) if plan.build else None
        )
        logs = [run_directory / spec.log_name for spec in plan.processes]
        self._upkeep = Upkeep(logs, limits.log_bytes, limits.log_files, progress)
        self.is_ready = False
        self._explain_at: float | None = None  # loop time; set once every process is up

    async def run(self, announce: Callable[[], None]) -> None:
        """Start all and keep all running until cancelled. Raises `StartFailed`, `GuardGone`."""
        if self._building is not None:
            self._building.start()
        for member in self._members:
            if self._building is None or member.spec.role != "orchestrator":
                member.start()
        await self._wait_ready()
        self.is_ready = True
        self.progress.settle()
        announce()
        while True:
            await self._tend()

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(self._limits.start_s):
                while not await self._are_all_ready():
                    await self._pause()
        except TimeoutError:
            waiting = [member for member in self._members if not member.is_ready]
            raise StartFailed(_late(waiting, self._limits.start_s)) from None

    async def _are_all_ready(self) -> bool:
        for member in self._members:
            member.check_started()
        self._start_held_back()
        await self._probe()
        return all(member.is_ready for member in self._members) and await self._is_whole()

    def _start_held_back(self) -> None:
        """Start the orchestrator, which waits for its compiled form: it serves nobody without workers."""
        held = [member for member in self._members if not member.is_started]
        if not held or self._building is None:
            return
        is_waited_for = all(member.is_ready for member in self._members if member not in held)
        if self._building.is_over() or (is_waited_for and self._building.may_be_left()):
            for member in held:
                member.start()

    async def _is_whole(self) -> bool:
        """Return whether every model can be served.

        Workers of other machines may be missing: that is said once.
        """
        now = asyncio.get_running_loop().time()
        if self._explain_at is None:
            self._explain_at = now + EXPLAIN_AFTER_S
        elif now >= self._explain_at:
            self._explain_at = math.inf
            self.progress.say(f"all is started, but not every model can be served yet; see {self._url}/ready")
        return await self._answers(f"{self._url}/ready")

    async def _tend(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._building is not None:
            self._building.is_over()
        for member in self._members:
            member.tend(now)
        await self._probe()
        await self._pause()

    async def _pause(self) -> None:
        if not self._guard.is_alive():
            raise GuardGone
        self.progress.tick()
        self._upkeep.tend(asyncio.get_running_loop().time())
        await asyncio.sleep(POLL_S)

    async def _probe(self) -> None:
        await asyncio.gather(*(self._probe_one(m) for m in self._members if m.is_running and not m.is_ready))

    async def _probe_one(self, member: _Member) -> None:
        if await self._answers(member.spec.ready_url) and member.is_running:
            member.mark_ready()

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False

    def reload(self) -> None:
        """Have the orchestrator read its config again; its workers change with a restart only."""
        for member in self._members:
            if member.spec.role == "orchestrator":
                member.reload()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Stop the orchestrator first, so that it drains while its workers run; then the workers together."""
        limits = self._limits
        if self._building is not None:
            await self._building.stop()
        first = [member for member in self._members if member.spec.role == "orchestrator"]
        then = [member for member in self._members if member.spec.role != "orchestrator"]
        await asyncio.gather(*(member.stop(limits.stop_orchestrator_s, hurry) for member in first))
        await asyncio.gather(*(member.stop(limits.stop_worker_s, hurry) for member in then))


class _Member:
    """A member is one process of the plan through all its starts: starting, ready, waiting for the next."""

    def __init__(
        self, spec: ProcessSpec, log: Path, limits: Limits, progress: Progress, guard: Guard
    ) -> None:
        self.spec = spec
        self.is_ready = False
        self._log = log
        self._limits = limits
        self._progress = progress
        self._guard = guard
        self._group: ProcessGroup | None = None
        self._started_at = 0.0  # loop time
        self._restart_at: float | None = None  # loop time; None unless it died
        self._delay_s = 0.0

    @property
    def is_started(self) -> bool:
        return self._group is not None

    @property
    def is_running(self) -> bool:
        return self._group is not None and self._restart_at is None

    def start(self) -> None:
        """Start the process. Raises `StartFailed` if the operating system refuses."""
        try:
            self._group = ProcessGroup(self.spec, self._log, self._guard)
        except OSError as error:
            raise StartFailed(f"{self.spec.name} cannot be started: {error}") from error
        self._started_at = asyncio.get_running_loop().time()
        self._restart_at = None
        self._progress.set(self.spec.name, "starting")

    def mark_ready(self) -> None:
        self.is_ready = True
        self._progress.set(self.spec.name, "ready")

    def reload(self) -> None:
        """Have the process reload if it is ready; else it reads the config anyway, or SIGHUP may kill it."""
        if self._group is not None and self.is_ready:
            self._group.hang_up()
            self._progress.say(f"{self.spec.name}: reloads the config; its log tells what came of it")

    def check_started(self) -> None:
        """Raise `StartFailed` if the process has ended."""
        code = self._group.exit_code() if self._group is not None else None
        if code is not None:
            self._progress.set(self.spec.name, "failed")
            raise StartFailed(_report(self.spec.name, code, self._log))

    def tend(self, now: float) -> None:
        """Notice the end of the process; start it again when its time has come. `now` is loop time."""
        if self._group is None:
            return
        if self._restart_at is None:
            code = self._group.exit_code()
            if code is not None:
                self._note_death(code, now)
        elif now >= self._restart_at and self._group.is_gone():  # its ports are free again
            self._group.forget()
            self._start_again(now)

    def _note_death(self, code: int, now: float) -> None:
        assert self._group is not None  # noqa: S101  # for the type checker
        self._group.signal(signal.SIGKILL)  # what is left of its group is of no use
        self.is_ready = False
        self._delay_s = self._next_delay(now - self._started_at)
        self._restart_at = now + self._delay_s
        self._progress.set(self.spec.name, "died")
        self._progress.say(
            f"{self.spec.name} ended with {describe_exit(code)} and starts again in {self._delay_s:g} s"
            f" (log: {self._log}){_because(tail(self._log, SHOWN_LINES), code)}"
        )

    def _next_delay(self, ran_s: float) -> float:
        if self._delay_s == 0.0 or ran_s >= self._limits.stable_s:
            return self._limits.first_delay_s
        return min(self._delay_s * 2, self._limits.longest_delay_s)

    def _start_again(self, now: float) -> None:
        try:
            self.start()
        except StartFailed as error:
            self._delay_s = self._next_delay(0.0)
            self._restart_at = now + self._delay_s
            self._progress.say(f"{error}; tried again in {self._delay_s:g} s")

    async def stop(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Stop the process, if it was started. This can be repeated."""
        if self._group is None:
            return
        self._progress.set(self.spec.name, "stopping")
        has_obeyed = await self._group.end(limit_s, hurry)
        self._progress.set(self.spec.name, "stopped" if has_obeyed else "killed")
        self._group = None


def _report(name: str, code: int, log: Path) -> str:
    lines = tail(log, 200)
    shown = [f"  | {one_line(masked(line))}" for line in lines[-SHOWN_LINES:]] or ["  | (no output)"]
    head = f"{one_line(name)} ended while starting, with {describe_exit(code)}. Its last lines ({log}):"
    return "\n".join([head, *shown]) + _because(lines, code, log)


def _because(lines: Sequence[str], code: int, log: Path | None = None) -> str:
    cause = likely_cause(lines, code)
    if cause is None and log is not None and free_bytes(log.parent) < LEAST_FREE:
        cause = no_space(log.parent)
    return f"\nlikely cause: {cause}" if cause else ""


def _late(waiting: Sequence[_Member], limit_s: float) -> str:
    names = ", ".join(member.spec.name for member in waiting) or "every process runs, but the whole"
    return f"not ready after {limit_s:g} s: {names} (launch.start_timeout_s)"
