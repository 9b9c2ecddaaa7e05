"""A task of a job array runs one worker on the node where Slurm has put it, for as long as it is there.

    python -m launch.backends.slurm.task FOLDER MODEL/ROLE

It picks ports, says in the folder where the worker is, starts the engine, and starts it again as often as it
ends.
These signals come from `baton up` by scancel, or from Slurm before the time is over:

    TERM   let the requests under way come to their end, then end the engine and the task
    INT    end both at once
    USR1   end the engine, and keep the place for the next one
    USR2   go on, after USR1
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

import msgspec.structs

from launch.backends.here import reachable_address
from launch.backends.node import Reserved, place_of, spec_here
from launch.backends.slurm.drain import drain
from launch.backends.slurm.report import (
    CONFIG,
    MEMBERS,
    NO_FOLDER,
    NO_PLAN,
    State,
    TaskReport,
    age_of,
    uid_of,
    write_report,
)
from launch.backends.slurm.script import drain_s
from launch.engines.base import PlanError
from launch.local.further import pool_of
from launch.local.processes import Guard, ProcessGroup, describe_exit
from launch.plan import ProcessSpec
from orchestrator.config.keys import worker_key
from orchestrator.config.options import Config
from orchestrator.errors import SettingError
from orchestrator.wire.info import Role
from orchestrator.wire.member import Member, remove_member, write_member

POLL_S: Final = 0.1
CLAIM_S: Final = 5.0  # between two looks at the member's file
FIRST_DELAY_S: Final = 1.0  # before an engine that died is started again
LONGEST_DELAY_S: Final = 30.0
STABLE_S: Final = 60.0  # after so long a run the next delay is the first again

Wish = Literal["run", "park", "end"]


@dataclass(frozen=True, slots=True)
class Post:
    """A post is what a task is for, and where it is."""

    folder: Path
    config: Config
    worker: str  # MODEL/ROLE/INDEX
    incarnation: str  # JOB.INDEX.RESTARTS
    node: str
    host: str  # at which others reach the node
    key: str | None  # that the worker takes

    @property
    def pool(self) -> tuple[str, Role]:
        model, role = pool_of(self.worker)
        return model, cast("Role", role)

    @property
    def number(self) -> str:
        """Return what the worker is called within its pool."""
        return self.worker.rpartition("/")[2]


def main(argv: list[str]) -> int:
    folder, pool = Path(argv[1]), argv[2]
    try:
        content = (folder / CONFIG).read_bytes()
    except OSError as error:
        print(f"{socket.gethostname()} cannot read {folder / CONFIG}: {error.strerror}", file=sys.stderr)
        return NO_FOLDER
    try:
        post = post_of(folder, Config.model_validate_json(content), pool, os.environ)
    except (PlanError, SettingError, OSError) as error:
        print(error, file=sys.stderr)
        return NO_PLAN
    return asyncio.run(_run(post))


def post_of(folder: Path, config: Config, pool: str, environ: Mapping[str, str]) -> Post:
    """Return what this task is for, by the environment that Slurm gives it.

    Raises `PlanError`, `SettingError`, `OSError`.
    """
    job, index = environ["SLURM_ARRAY_JOB_ID"], environ["SLURM_ARRAY_TASK_ID"]
    peers = filter(None, [environ.get("SLURM_SUBMIT_HOST")])
    return Post(
        folder,
        config,
        f"{pool}/{index}",
        incarnation=f"{job}.{index}.{environ.get('SLURM_RESTART_COUNT', '0')}",
        node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        host=reachable_address(peers, config.launch.slurm.network),
        key=worker_key(environ),
    )


async def _run(post: Post) -> int:
    wishes = Wishes()
    with wishes.heard(), Guard() as guard:
        await Keeper(post, wishes, guard).keep()
    return 0


class Wishes:
    """What is to become of the worker; signals change it."""

    def __init__(self) -> None:
        self.wish: Wish = "run"
        self.is_gentle = False  # its requests come to their end first

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear signals until the block ends."""
        loop = asyncio.get_running_loop()
        heard = {
            signal.SIGTERM: lambda: self.end(is_gentle=True),
            signal.SIGINT: lambda: self.end(is_gentle=False),
            signal.SIGUSR1: lambda: self._change("park"),
            signal.SIGUSR2: lambda: self._change("run"),
        }
        for number, act in heard.items():
            loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    def end(self, *, is_gentle: bool) -> None:
        """Have the worker end; `is_gentle`: after its requests."""
        self.is_gentle = is_gentle and (self.is_gentle or self.wish != "end")
        self.wish = "end"

    def _change(self, wish: Wish) -> None:
        if self.wish != "end":
            self.wish = wish


class Keeper:
    """A keeper keeps the engine of one worker running, and tells of it."""

    def __init__(self, post: Post, wishes: Wishes, guard: Guard) -> None:
        self._post = post
        self._wishes = wishes
        self._guard = guard
        self._starts = 0
        self._delay_s = 0.0
        self._code: int | None = None

    async def keep(self) -> None:
        """Keep the engine running until the task is to end."""
        while self._wishes.wish != "end":
            if self._wishes.wish == "park":
                self._tell("parked")
                await self._wait_for_other_wish("park")
                continue
            ran_s = await self._run_once()
            if self._wishes.wish == "run":
                await self._wait_a_while(ran_s)

    async def _run_once(self) -> float:
        """Run the engine once; returns how many seconds it ran."""
        begun = asyncio.get_running_loop().time()
        try:
            with Reserved() as reserved:
                await self._run_at(reserved)
        except (OSError, PlanError) as error:
            print(f"the worker cannot be started: {error}", file=sys.stderr, flush=True)
            self._code = None  # that of the start before is not this one's
            self._tell("ended", str(error))
        return asyncio.get_running_loop().time() - begun

    async def _run_at(self, reserved: Reserved) -> None:
        post = self._post
        spec = spec_here(post.config, post.worker, post.host, reserved)
        self._starts += 1
        member = self._member(spec)
        write_member(self._folder, member)
        self._tell("starting")
        group = ProcessGroup(spec, Path("/dev/stdout"), self._guard)
        try:
            await self._watch(group, member)
            if group.exit_code() is None and self._wishes.is_gentle:
                await self._drain(group, member)
        finally:
            await self._end(group, member)

    def _member(self, spec: ProcessSpec) -> Member:
        """Return what the orchestrator is told of the worker."""
        post = self._post
        model, role = post.pool
        return Member(
            uid=f"{post.incarnation}.{self._starts}",
            name=post.number,
            model=model,
            role=role,
            url=spec.url,
            zone=place_of(post.config, post.worker, post.host).pool.zone,
        )

    async def _watch(self, group: ProcessGroup, member: Member) -> None:
        """Wait until the engine ends by itself, or is to end."""
        loop = asyncio.get_running_loop()
        claim_at = loop.time() + CLAIM_S
        while group.exit_code() is None and self._wishes.wish == "run":
            if loop.time() >= claim_at:
                self._claim(member)
                claim_at = loop.time() + CLAIM_S
            await asyncio.sleep(POLL_S)

    def _claim(self, member: Member) -> None:
        """See to it that the member's file is there, unless Slurm has given the worker another place: it may
        take a node for lost that lives.
        """
        found = uid_of(self._folder, member)
        if age_of(found) > age_of(member.uid):
            print(f"the worker is elsewhere now, as {found}: this one ends", file=sys.stderr, flush=True)
            self._wishes.end(is_gentle=True)
        elif found != member.uid:
            with contextlib.suppress(OSError):
                write_member(self._folder, member)

    async def _drain(self, group: ProcessGroup, member: Member) -> None:
        self._tell("stopping")
        with contextlib.suppress(OSError):
            if uid_of(self._folder, member) == member.uid:
                write_member(self._folder, msgspec.structs.replace(member, is_draining=True))
        post = self._post
        is_free = await drain(member.url, post.key, drain_s(post.config), lambda: self._is_over(group))
        print(f"the worker is {'free' if is_free else 'not known to be free'}, and ends", flush=True)

    def _is_over(self, group: ProcessGroup) -> bool:
        return group.exit_code() is not None or not self._wishes.is_gentle

    async def _end(self, group: ProcessGroup, member: Member) -> None:
        """End the engine, if it has not ended by itself; nobody is told that there is a worker any more."""
        died = group.exit_code()
        if died is not None:
            group.signal(signal.SIGKILL)  # what is left of its group is of no use
        await group.end(self._post.config.launch.stop_timeout_s, asyncio.Event())
        self._code = died
        with contextlib.suppress(OSError):
            remove_member(self._folder, member.uid)
        if died is not None:
            print(f"the engine ended with {describe_exit(died)}", file=sys.stderr, flush=True)
            self._tell("ended")

    async def _wait_a_while(self, ran_s: float) -> None:
        is_first = self._delay_s == 0.0 or ran_s >= STABLE_S
        self._delay_s = FIRST_DELAY_S if is_first else min(self._delay_s * 2, LONGEST_DELAY_S)
        print(f"the worker starts again in {self._delay_s:g} s", file=sys.stderr, flush=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay_s):
                await self._wait_for_other_wish("run")

    async def _wait_for_other_wish(self, wish: Wish) -> None:
        while self._wishes.wish == wish:  # noqa: ASYNC110  # signals come when they come
            await asyncio.sleep(POLL_S)

    # --- what is told ---------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self._post.folder / MEMBERS

    def _tell(self, state: State, problem: str | None = None) -> None:
        """Say how it stands; a folder that cannot be written now is no reason to stop serving."""
        post = self._post
        report = TaskReport(
            incarnation=post.incarnation,
            state=state,
            starts=self._starts,
            code=self._code,
            node=post.node,
            problem=problem,
        )
        with contextlib.suppress(OSError):
            write_report(post.folder, *post.pool, post.number, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
