"""`up` starts everything, waits until it is ready, keeps it running, and stops it in reverse."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from launch.exits import Exit
from launch.local.member import Limits, Member, StartFailed
from launch.local.processes import Guard
from launch.local.progress import Progress
from launch.local.run_state import StateWriter
from launch.local.upkeep import Upkeep
from launch.plan import Plan
from orchestrator.loop.signals import on_hangup

POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0
EXPLAIN_AFTER_S = 5.0  # the orchestrator needs a moment to find its workers
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    plan: Plan,
    run_directory: Path,
    limits: Limits,
    progress: Progress,
    writer: StateWriter,
    announce: Callable[[], None],
) -> Exit:
    """Run the plan until a signal; SIGHUP has the orchestrator reload its config instead.

    `announce` is called once, when all is ready. No process is left after. What runs is told to `writer`.
    """
    stop = Stop()
    with stop.on_signals(), Guard() as guard:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False) as client:  # noqa: S501  # our own children
            cluster = _Cluster(plan, run_directory, limits, progress, guard, client, writer)
            try:
                with on_hangup(cluster.reload, stop.request):
                    return await _until_stopped(cluster, stop, announce)
            finally:
                await cluster.stop(stop.hurry)
                cluster.note_end()


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
        writer: StateWriter,
    ) -> None:
        self._url = plan.url
        self._limits = limits
        self.progress = progress
        self._guard = guard
        self._client = client
        self._writer = writer
        self._members = [
            Member(spec, run_directory / spec.log_name, limits, progress, guard) for spec in plan.processes
        ]
        logs = [run_directory / spec.log_name for spec in plan.processes]
        self._upkeep = Upkeep(logs, limits.log_bytes, limits.log_files, progress)
        self.is_ready = False
        self._explain_at: float | None = None  # loop time; set once every process is up

    async def run(self, announce: Callable[[], None]) -> None:
        """Start all and keep all running until cancelled. Raises `StartFailed`, `GuardGone`."""
        for member in self._members:
            member.start()
        self._note()
        await self._wait_ready()
        self.is_ready = True
        self.progress.settle()
        self._note()
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
        await self._probe()
        return all(member.is_ready for member in self._members) and await self._is_whole()

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
        for member in self._members:
            member.tend(now)
        await self._probe()
        await self._pause()

    async def _pause(self) -> None:
        if not self._guard.is_alive():
            raise GuardGone
        self.progress.tick()
        self._note()
        self._upkeep.tend(asyncio.get_running_loop().time())
        await asyncio.sleep(POLL_S)

    def _note(self) -> None:
        self._writer.note([member.entry() for member in self._members], is_ready=self.is_ready)

    def note_end(self) -> None:
        """Note that nothing runs any more."""
        self._writer.end([member.entry() for member in self._members])

    async def _probe(self) -> None:
        await asyncio.gather(*(self._probe_one(m) for m in self._members if m.is_running and not m.is_ready))

    async def _probe_one(self, member: Member) -> None:
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
        first = [member for member in self._members if member.spec.role == "orchestrator"]
        then = [member for member in self._members if member.spec.role != "orchestrator"]
        await asyncio.gather(*(member.stop(limits.stop_orchestrator_s, hurry) for member in first))
        await asyncio.gather(*(member.stop(limits.stop_worker_s, hurry) for member in then))


def _late(waiting: Sequence[Member], limit_s: float) -> str:
    names = ", ".join(member.spec.name for member in waiting) or "every process runs, but the whole"
    return f"not ready after {limit_s:g} s: {names} (launch.start_timeout_s)"
