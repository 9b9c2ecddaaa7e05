"""`up` starts everything, waits until it is ready, keeps it running, and stops it in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from launch.backends.base import Backend, BackendError
from launch.backends.local import Local
from launch.backends.placed import PlacedWorkers
from launch.exits import Exit
from launch.local.building import Building
from launch.local.control import CommandFailed, commands_taken
from launch.local.fleet import Fleet
from launch.local.further import FurtherWorkers
from launch.local.member import Limits, Member, StartFailed
from launch.local.operations import Operator
from launch.local.processes import Guard, NoGuard
from launch.local.progress import Progress
from launch.local.registrar import Registrar
from launch.local.run_state import STOPPING, StateWriter
from launch.local.scaling import Scaling
from launch.plan import Plan
from orchestrator.loop.signals import on_hangup

POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0
MOVE_AGAIN_S = 60.0  # after a worker could not be moved
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


@dataclass(frozen=True, slots=True)
class Site:
    """A run is kept here, and told of by these."""

    directory: Path
    limits: Limits
    progress: Progress
    writer: StateWriter
    further: FurtherWorkers | PlacedWorkers | None = None  # plans workers that the plan has not
    key: str = ""  # that the orchestrator takes from us
    backend: Callable[[Guard], Backend] = Local  # makes what has the workers
    registrar: Callable[[httpx.AsyncClient, Sequence[str], str], Registrar] = Registrar
    discover: Callable[[Plan, Path], Plan] = lambda plan, _: plan  # has orchestrators look into a folder
    scaled: Collection[tuple[str, str]] = ()  # model and role of pools that follow the load


async def supervise(plan: Plan, site: Site, announce: Callable[[], None]) -> Exit:
    """Run the plan until a signal; SIGHUP has the orchestrator reload its config instead.

    `announce` is called once, when all is ready. No process is left after. Commands are taken at a socket
    (`launch/local/control.py`) meanwhile.
    """
    stop = Stop()
    try:
        with stop.on_signals(), Guard() as guard:
            return await _run(plan, site, announce, stop, guard)
    except NoGuard as error:
        site.progress.say(str(error))
        return Exit.START_FAILED


async def _run(plan: Plan, site: Site, announce: Callable[[], None], stop: Stop, guard: Guard) -> Exit:
    async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False) as client:  # noqa: S501  # our own children
        here = Local(guard)
        backend = site.backend(guard)
        if backend.members is not None:
            plan = site.discover(plan, backend.members)
        fleet = Fleet(plan.processes, site.directory, site.limits, site.progress, here, backend)
        registrar = site.registrar(client, plan.admins, site.key)
        operator = Operator(fleet, registrar, site.further, site.key)
        scaling = Scaling(fleet, operator, registrar, site.scaled, site.progress.say)
        cluster = _Cluster(
            plan.url, fleet, guard, client, site.writer, operator, _building(plan, site, guard), backend
        )
        try:
            with on_hangup(cluster.reload, stop.request):
                code = await _until_stopped(cluster, operator, scaling, site.directory, stop, announce)
        finally:
            has_ended_all = await cluster.stop(stop.hurry)
        return code if has_ended_all or code is Exit.START_FAILED else Exit.FAILED


def _building(plan: Plan, site: Site, guard: Guard) -> Building | None:
    if plan.build is None:
        return None
    return Building(plan.build, site.directory / plan.build.log_name, guard, site.progress)


async def _until_stopped(
    cluster: _Cluster,
    operator: Operator,
    scaling: Scaling,
    directory: Path,
    stop: Stop,
    announce: Callable[[], None],
) -> Exit:
    running = asyncio.create_task(cluster.run(announce))
    following = asyncio.create_task(scaling.run())
    stopping = asyncio.create_task(stop.requested.wait())
    try:
        async with _commands(directory, operator, cluster.fleet.progress):
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        return Exit.OK if cluster.fleet.is_ready else Exit.INTERRUPTED
    except StartFailed as error:
        cluster.fleet.progress.say(str(error))
        return Exit.START_FAILED
    except GuardGone:
        cluster.fleet.progress.say("the guard process has ended: everything is stopped, for safety")
        return Exit.FAILED
    finally:
        for task in (running, stopping, following):
            task.cancel()
        await asyncio.gather(running, stopping, following, return_exceptions=True)


@asynccontextmanager
async def _commands(directory: Path, operator: Operator, progress: Progress) -> AsyncIterator[None]:
    """Take commands until the block ends. Where that is not possible everything else is."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(commands_taken(directory, operator.handle))
        except OSError as error:
            progress.say(f"no commands are taken: {directory}: {error.strerror}")
        yield


class _Cluster:
    """A cluster keeps a fleet running. Only `run`, commands and, after these have ended, `stop` touch it."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        guard: Guard,
        client: httpx.AsyncClient,
        writer: StateWriter,
        operator: Operator,
        building: Building | None,
        backend: Backend,
    ) -> None:
        self.fleet = fleet
        self._backend = backend
        self._building = building
        self._url = url
        self._guard = guard
        self._client = client
        self._writer = writer
        self._operator = operator
        self._stepping: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._move_at = 0.0  # loop time
        fleet.note = self._note
        self._explain_at: float | None = None  # loop time; set once every process is up

    async def run(self, announce: Callable[[], None]) -> None:
        """Start all and keep all running until cancelled. Raises `StartFailed`, `GuardGone`."""
        self._note()
        await self._open()
        if self._building is not None:
            self._building.start()
        for member in self.fleet.members:
            if self._building is None or member not in self.fleet.orchestrators:
                member.start()
        self._note()
        await self._wait_ready()
        self.fleet.is_ready = True
        self.fleet.progress.settle()
        self._note()
        announce()
        while True:
            await self._tend()

    async def _open(self) -> None:
        self._writer.handle = self._backend.handle
        self._note()  # should we be killed meanwhile
        try:
            await self._backend.open([member.spec for member in self.fleet.workers])
        except BackendError as error:
            raise StartFailed(str(error)) from error
        self._writer.handle = self._backend.handle
        self._note()

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(self.fleet.limits.start_s):
                while not await self._are_all_ready():
                    await self._pause()
        except TimeoutError:
            waiting = [member for member in self.fleet.members if not member.is_ready]
            raise StartFailed(_late(waiting, self.fleet.limits.start_s)) from None

    async def _are_all_ready(self) -> bool:
        for member in self.fleet.members:
            member.check_started()
        self._start_held_back()
        await self._probe()
        return all(member.is_ready for member in self.fleet.members) and await self._is_whole()

    def _start_held_back(self) -> None:
        """Start orchestrators, which wait for their compiled form: they serve nobody without workers."""
        waiting = [member for member in self.fleet.orchestrators if not member.is_started]
        if self._building is None or not waiting:
            return
        is_waited_for = all(member.is_ready for member in self.fleet.workers)
        if self._building.is_over() or (is_waited_for and self._building.may_be_left()):
            for member in waiting:
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
            self.fleet.progress.say(
                f"all is started, but not every model can be served yet; see {self._url}/ready"
            )
        ready = [self._answers(f"{member.spec.url}/ready") for member in self.fleet.orchestrators]
        return all(await asyncio.gather(*ready))

    async def _tend(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._building is not None:
            self._building.is_over()
        for member in self.fleet.members:
            member.tend(now)
        await self._probe()
        self._keep_in_step()
        self._keep_places(now)
        await self._pause()

    def _keep_in_step(self) -> None:
        """Have the orchestrator told, beside all else, what it should know and does not."""
        is_free = self._stepping is None or self._stepping.done()
        if is_free and not self.fleet.is_in_step and self.fleet.operation is None:
            self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        with contextlib.suppress(CommandFailed):  # tried again at the next look
            await self._operator.bring_in_step()

    def _keep_places(self, now: float) -> None:
        """Have workers move whose places are lost soon, one after the other, beside all else."""
        is_free = self._moving is None or self._moving.done()
        is_wanted = bool(self.fleet.expiring())
        if is_free and is_wanted and self.fleet.operation is None and now >= self._move_at:
            self._moving = asyncio.create_task(self._move())

    async def _move(self) -> None:
        try:
            await self._operator.move_one()
        except CommandFailed as error:
            self._move_at = asyncio.get_running_loop().time() + MOVE_AGAIN_S
            self.fleet.progress.say(f"{error}; tried again in {MOVE_AGAIN_S:g} s")

    async def _pause(self) -> None:
        if not self._guard.is_alive():
            raise GuardGone
        self.fleet.progress.tick()
        self._note()
        self.fleet.upkeep.tend(asyncio.get_running_loop().time())
        await asyncio.sleep(POLL_S)

    def _note(self) -> None:
        fleet = self.fleet
        self._writer.note(fleet.entries(), is_ready=fleet.is_ready, operation=fleet.operation)

    async def _probe(self) -> None:
        starting = [member for member in self.fleet.members if member.may_answer and not member.is_ready]
        await asyncio.gather(*map(self._probe_one, starting))

    async def _probe_one(self, member: Member) -> None:
        if await self._answers(member.spec.ready_url) and member.may_answer:
            member.mark_ready()
            if member in self.fleet.orchestrators and self.fleet.is_ready:
                self.fleet.is_in_step = False

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False

    def reload(self) -> None:
        """Have the orchestrators read their config again; workers change with a restart only."""
        for member in self.fleet.orchestrators:
            member.reload()

    async def stop(self, hurry: asyncio.Event) -> bool:
        """Stop the orchestrator first, so that it drains while its workers run; then the workers together.

        Returns whether nothing can be left of the run.
        """
        self.fleet.operation = STOPPING
        self._note()
        for task in (self._stepping, self._moving):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._building is not None:
            await self._building.stop()
        limits = self.fleet.limits
        await self._stopped(self.fleet.orchestrators, limits.stop_orchestrator_s, hurry)
        await self._stopped(self.fleet.workers, limits.stop_worker_s, hurry)
        try:
            await self._backend.close()
        except BackendError as error:  # the file goes on to say that there are workers
            self.fleet.progress.say(f"{error}; `baton down` tries that again")
            return False
        self._writer.end(self.fleet.entries())
        return True

    async def _stopped(self, members: Sequence[Member], limit_s: float, hurry: asyncio.Event) -> None:
        stops = [asyncio.create_task(member.stop(limit_s, hurry)) for member in members]
        await asyncio.sleep(0)  # they are stopping now
        self._note()
        await asyncio.gather(*stops)


def _late(waiting: Sequence[Member], limit_s: float) -> str:
    names = ", ".join(map(_waits, waiting)) or "every process runs, but the whole"
    return f"not ready after {limit_s:g} s: {names} (launch.start_timeout_s)"


def _waits(member: Member) -> str:
    return f"{member.spec.name} ({member.trouble})" if member.trouble else member.spec.name
