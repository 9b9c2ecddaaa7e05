"""On Slurm each pool is a job array, whose tasks run a worker each (`launch/backends/slurm/task.py`).

Slurm finds the places, and finds others when a node is lost. What a worker does is read from files in a
folder that all nodes share: the orchestrator finds the workers there, and this backend hears of their
engines. What becomes of the tasks is read from Slurm's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, ParamSpec, Self, TypeVar, cast

from launch.backends.base import Backend, BackendError
from launch.backends.slurm import queue
from launch.backends.slurm.placed import PlacedTask
from launch.backends.slurm.queue import SlurmError, TaskRow, Unanswered
from launch.backends.slurm.report import CONFIG, MEMBERS, TASKS, read_report
from launch.backends.slurm.script import SCRIPTS, drain_s, job_of, script
from launch.local.further import pool_of
from launch.local.processes import Guard
from launch.local.upkeep import prune
from launch.plan import ProcessSpec
from launch.surroundings import look_around
from orchestrator.config.options import Config
from orchestrator.config.printing import counted, one_line
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.wire.info import Role
from orchestrator.wire.member import Member, read_members, remove_member

# Slurm's controller serves the whole cluster: it is asked often only while something is to change.
FAST_S: Final = 0.5
SLOW_S: Final = 5.0
TICK_S: Final = 0.1
MOVE_S: Final = 300.0  # for a worker that moves to be placed, and to start
OBEYS_S: Final = 20.0  # until tasks that are told to end are killed
CALL_S: Final = 180.0  # for a call and the one before it: each command has 30 s, and a sweep takes more
SWEEP_S: Final = 60.0  # until the jobs of a killed run are gone
MIB: Final = 1024 * 1024

_P = ParamSpec("_P")
_T = TypeVar("_T")


class SlurmBackend(Backend):
    """It submits, watches and cancels the jobs of one run."""

    def __init__(self, config: Config, directory: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._directory = directory.absolute()
        self._run = directory.name
        given = config.launch.slurm.folder
        self._folder = self._directory if given is None else Path(given).expanduser().absolute() / self._run
        self._around = look_around()
        self._tasks: dict[str, PlacedTask] = {}  # by the worker's name
        self._leaving: list[PlacedTask] = []  # their places are given up
        self._watching: asyncio.Task[None] | None = None
        self._silence: str | None = None  # why Slurm does not answer now
        self._problems: set[str] = set()  # of the folder, that were told
        self._calls = BoundedCalls("ask Slurm", CALL_S)
        self._submitting = threading.Lock()  # held while Slurm is given a job
        self._may_have_jobs = False
        self._is_closed = False
        self._has_folder = False  # which is no other run's

    @classmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        return cls(config, directory, say)

    @property
    def members(self) -> Path:
        return self._folder / MEMBERS

    @property
    def handle(self) -> Mapping[str, str]:
        return {"run": self._run, "folder": str(self._folder)}

    async def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Ask Slurm, or use the folder, beside the event loop. Raises `BackendError` if that hangs, and what
        `function` raises.
        """
        try:
            return await self._calls.make(function, *args, **kwargs)
        except TimeoutError:
            where = f"Slurm's commands, or the file system of {self._folder}, do not answer"
            raise BackendError(f"{where} within {CALL_S:g} s") from None

    # --- submitting -----------------------------------------------------------------------------

    async def open(self, specs: Sequence[ProcessSpec]) -> None:
        self._make_folder()
        await self._call(_check_reached)
        pools: dict[tuple[str, str], list[ProcessSpec]] = {}
        for spec in specs:
            pools.setdefault(pool_of(spec.name), []).append(spec)
        for of_pool in pools.values():
            self._enlist(of_pool, await self._call(self._submit, of_pool))
        self._watching = asyncio.create_task(self._watch())

    def start(self, spec: ProcessSpec, log: Path) -> PlacedTask:
        task = self._tasks.get(spec.name)
        if task is not None and task.is_expiring and task.is_parked:
            self.dismiss(spec.name)
            task = None
        if task is None or task.is_gone():
            self._enlist([spec], self._submit([spec]))
        else:
            self._resume(task)
        return self._tasks[spec.name]

    def _resume(self, task: PlacedTask) -> None:
        try:
            task.resume()
        except SlurmError as error:
            raise BackendError(str(error)) from error

    def dismiss(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            self._leaving.append(task)

    def _enlist(self, specs: Iterable[ProcessSpec], job: str) -> None:
        for spec in specs:
            self._link_log(spec)
            self._tasks[spec.name] = PlacedTask(spec.name, job, self._folder)

    def _submit(self, specs: Sequence[ProcessSpec]) -> str:
        """Submit a job with a task for each of these workers of one pool; returns its number. Raises
        `BackendError`.
        """
        model, role = pool_of(specs[0].name)
        job = job_of(
            self._config,
            model,
            cast("Role", role),
            [int(spec.name.rpartition("/")[2]) for spec in specs],
            run=self._run,
            folder=self._folder,
            python=sys.executable,
            imports=self._around.imports,
        )
        path = self._folder / job.file_name
        try:
            with self._submitting:
                self._check_open()
                path.write_text(script(job))
                return self._number_of(path)
        except OSError as error:
            raise BackendError(f"{path} cannot be written: {error.strerror}") from error
        except SlurmError as error:
            raise BackendError(f"{job.pool} gets no place in Slurm: {error}") from error

    def _check_open(self) -> None:
        if self._is_closed:  # meanwhile: nobody would end the job
            raise BackendError("the run ends: no job is submitted any more")

    def _number_of(self, path: Path) -> str:
        """Submit a script, and return the number of its job. Raises `SlurmError`."""
        before, self._may_have_jobs = self._may_have_jobs, True
        try:
            return queue.submit(path)
        except Unanswered:
            raise
        except SlurmError:
            self._may_have_jobs = before
            raise

    # --- the folder -----------------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            if self._folder != self._directory:
                self._folder.mkdir(parents=True, mode=0o700)
                prune(self._folder, self._config.launch.keep_runs, int(self._config.launch.keep_mb * MIB))
            self.members.mkdir()
            self._has_folder = True
            (self._folder / TASKS).mkdir()
            path = self._folder / CONFIG
            path.touch(0o600)  # there may be secrets in the environment of a pool
            path.write_text(self._config.model_dump_json(exclude_unset=True))
        except OSError as error:
            why = f"{self._folder} cannot be used: {error.strerror}"
            raise BackendError(f"{why} (launch.slurm.folder)") from error

    def _link_log(self, spec: ProcessSpec) -> None:
        """Have the log, which is in the folder, found in the run's directory."""
        link = self._directory / spec.log_name
        if self._folder != self._directory:
            with contextlib.suppress(FileExistsError):
                link.symlink_to(self._folder / spec.log_name)

    # --- watching -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception as error:  # a bug of ours must not end what looks after the workers
                self._tell_once(f"Slurm's queue could not be looked at: {error!r}")
            await self._pause(SLOW_S if self._is_settled() else FAST_S)

    async def _pause(self, seconds: float) -> None:
        """Wait, or until something is to change."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (seconds <= FAST_S or self._is_settled()):  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)  # many things change what is settled

    def _is_settled(self) -> bool:
        return not self._leaving and all(task.is_settled for task in self._tasks.values())

    async def _look(self) -> None:
        asked_at = time.monotonic()
        try:
            rows = await self._call(queue.queue)
        except (SlurmError, BackendError) as error:
            self._note_silence(str(error))
            return
        self._note_silence(None)
        ours = {(row.job, row.index): row for row in rows if row.run == self._run}
        for task in (*self._tasks.values(), *self._leaving):
            task.see(ours.get((task.job, task.index)), asked_at)
            task.lead_s = lead_s(self._config, len(self._tasks))
        members = self._read_members()
        self._clear_stale(members, ours)
        await self._move_on()

    def _note_silence(self, why: str | None) -> None:
        if why is not None and self._silence is None:
            self._say(f"{why}; workers go on, and nothing is known of their jobs meanwhile")
        if why is None and self._silence is not None:
            self._say("Slurm answers again")
        self._silence = why

    def _read_members(self) -> Sequence[Member]:
        try:
            found = read_members(self.members)
        except OSError as error:
            self._tell_once(f"{self.members} cannot be read: {error.strerror}")
            return ()
        for problem in found.problems:
            self._tell_once(f"{self.members / problem.place} is left out: {problem.reason}; remove it")
        places = {(member.model, member.role, member.name): member for member in found.members}
        for task in self._tasks.values():
            model, role = pool_of(task.name)
            task.member = places.get((model, cast("Role", role), str(task.index)))
        self._read_reports()
        return found.members

    def _tell_once(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.add(problem)
            self._say(one_line(problem))

    def _read_reports(self) -> None:
        for task in self._tasks.values():
            model, role = pool_of(task.name)
            task.note(read_report(self._folder, model, cast("Role", role), str(task.index)))

    def _clear_stale(self, members: Iterable[Member], rows: Mapping[tuple[str, int], TaskRow]) -> None:
        """Remove what tasks that are gone, by what Slurm says, have left."""
        for member in members:
            if is_stale(member.uid, rows):
                with contextlib.suppress(OSError):
                    remove_member(self.members, member.uid)

    async def _move_on(self) -> None:
        """Have tasks that lost their node wait no longer than they must, submit anew what has ended, and have
        those end that nobody wants any more.
        """
        self._leaving = [task for task in self._leaving if not task.is_gone()]
        for task in [*self._tasks.values()]:
            if task.is_due(time.monotonic()):
                await self._submit_again(task)
        acts = [task.leave for task in self._leaving]
        acts += [task.hasten for task in self._tasks.values() if task.is_delayed]
        acts += [task.park for task in self._tasks.values() if task.is_unruly]
        for act in acts:
            with contextlib.suppress(SlurmError, BackendError):  # tried again at the next look
                await self._call(act)

    async def _submit_again(self, task: PlacedTask) -> None:
        spec = ProcessSpec(task.name, cast("Role", pool_of(task.name)[1]), (), {}, "", (), "")
        try:
            task.follow(await self._call(self._submit, [spec]))
        except BackendError as error:
            task.refuse(str(error), time.monotonic())

    # --- the end --------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        await self._call(self._end_all)

    def _end_all(self) -> None:
        with self._submitting:  # by a thread that nobody waits for any more
            self._is_closed = True
            if self._may_have_jobs:
                self.sweep(self.handle)
            elif self._has_folder:
                _clear(self._folder)

    @classmethod
    def sweep(cls, handle: Mapping[str, str]) -> None:
        folder = Path(handle["folder"])
        try:
            if not _has_submitted_nothing(folder):
                end_all(handle["run"])
        except SlurmError as error:
            raise BackendError(f"its jobs in Slurm cannot be ended: {error}") from error
        _clear(folder)


def _check_reached() -> None:
    """Have a cluster that does not answer found before anything is submitted. Raises `BackendError`."""
    try:
        queue.check_reached()
    except SlurmError as error:
        raise BackendError(f"no cluster of Slurm can be used from here: {error}") from error


def _has_submitted_nothing(folder: Path) -> bool:
    """Return whether a run was killed before it had written a script, which it does before each job."""
    return folder.is_dir() and not any(folder.glob(SCRIPTS))


def _clear(folder: Path) -> None:
    """Remove from the folder of a run what only its tasks need."""
    for name in (MEMBERS, TASKS):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / CONFIG).unlink(missing_ok=True)


def lead_s(config: Config, workers: int) -> float:
    """Return how long before the end of their time workers begin to move, one after the other."""
    return (drain_s(config) + MOVE_S) * workers


def is_stale(uid: str, rows: Mapping[tuple[str, int], TaskRow]) -> bool:
    """Return whether the task that wrote a member's file is gone, by rows that were read before the file.

    A task that has begun since is newer than its row.
    """
    job, index, restarts, *_ = [*uid.split("."), "", "", ""]
    row = rows.get((job, int(index))) if index.isdigit() and restarts.isdigit() else None
    if row is None:
        return False
    return int(restarts) < row.restarts or (int(restarts) == row.restarts and row.has_ended)


def end_all(run: str) -> None:
    """End all jobs of a run, and wait until there is none. Raises `SlurmError`."""
    begun = time.monotonic()
    while left := sorted({row.job for row in queue.queue() if row.run == run and not row.has_ended}):
        since = time.monotonic() - begun
        if since > SWEEP_S:
            jobs = f"{counted(len(left), 'job')}, {', '.join(left)},"
            raise SlurmError(f"{jobs} had not ended after {SWEEP_S:g} s: `scancel` may end them")
        _end(left, by_force=since > OBEYS_S)
        time.sleep(FAST_S)


def _end(jobs: Sequence[str], *, by_force: bool) -> None:
    for job in jobs:
        queue.cancel_waiting(job)
        queue.signal_task(job, "INT")
    if by_force:
        queue.kill(jobs)
