"""On Ray each worker is an actor, on whichever node has what it needs. Ray starts lost ones elsewhere.

All that needs Ray is in a process of its own (`agent.py`). Neither `baton up` nor the orchestrator imports
it, and both live on if Ray's client ends its process, as it does when the head is away for a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from launch.backends.base import Backend, BackendError, Started
from launch.backends.node import gpus_of, place_of
from launch.backends.ray.link import Link, ask_once
from launch.local.further import pool_of
from launch.local.processes import Guard
from launch.plan import ProcessSpec
from orchestrator import __version__
from orchestrator.config.options import Config
from orchestrator.wire.info import STREAMS_ENV, TRANSPORT_ENV, WORKER_KEY_ENV
from orchestrator.wire.member import Member, remove_member, write_member

OPEN_S: Final = 90.0  # until a cluster is connected to, or started: 26 s were seen on a busy machine
STOP_MARGIN_S: Final = 5.0  # for Ray, beyond the time that an engine has to end
SWEEP_S: Final = 60.0
AGAIN_S: Final = 5.0  # until an agent that has ended is started again
LOG: Final = "ray.log"  # what Ray's client writes
MEMBERS: Final = "members"
# The orchestrator and its workers have to say the same in these.
_OF_BOTH_SIDES: Final = (TRANSPORT_ENV, STREAMS_ENV, WORKER_KEY_ENV)


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what workers on other nodes get of the environment here."""
    return {name: environ[name] for name in _OF_BOTH_SIDES if name in environ}


class RayBackend(Backend):
    """Its actors are detached: they outlive `baton up` if that is killed, until `baton down` sweeps them."""

    is_here: ClassVar[bool] = False

    def __init__(self, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> None:
        self._config = config
        self._folder = directory / MEMBERS
        self._say = say
        self._namespace = f"baton-{directory.name}-{secrets.token_hex(4)}"
        self._workers: dict[str, RayWorker] = {}
        self._wanted: dict[str, Any] = {}
        self._address = ""
        self._link = Link(directory / LOG, guard, self._hear)
        self._keeping: asyncio.Task[None] | None = None

    @classmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        return cls(config, directory, say, guard)

    @property
    def members(self) -> Path | None:
        return self._folder

    @property
    def handle(self) -> Mapping[str, str]:
        if not self._address:
            return {}  # nothing is made in a cluster that was never connected to
        if self._config.launch.ray.address == "local":
            return {}  # the cluster ends with us
        return {"address": self._address, "namespace": self._namespace}

    async def open(self, specs: Sequence[ProcessSpec]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wanted = {
            "address": self._config.launch.ray.address,
            "namespace": self._namespace,
            "pools": self._pools([spec.name for spec in specs]),
            "config": self._config.model_dump_json(exclude_unset=True),
            "environ": passed_on(os.environ),
            "version": __version__,
        }
        await self._connect()
        self._keeping = asyncio.create_task(self._keep())

    def _pools(self, names: Sequence[str]) -> list[dict[str, Any]]:
        settings = self._config.launch.ray
        pools: dict[str, dict[str, Any]] = {}
        for name in names:
            gpus = gpus_of(self._config, name)
            bundle = {"CPU": settings.cpus, **({"GPU": gpus} if gpus else {}), **settings.resources}
            pool = "/".join(pool_of(name))
            made = {"name": pool, "workers": [], "bundle": bundle, "is_spread": settings.spread == "node"}
            pools.setdefault(pool, made)["workers"].append(name)
        return [*pools.values()]

    async def _connect(self) -> None:
        """Have an agent that is connected to the cluster. Raises `BackendError`."""
        await self._link.open()
        done = await self._link.ask(OPEN_S, do="open", wanted=self._wanted)
        self._address = done["address"]
        if self._wanted["address"] == "auto":
            self._wanted["address"] = self._address  # there may be another one tomorrow

    async def _keep(self) -> None:
        """Start the agent again whenever it ends: the actors go on without it."""
        while True:
            await self._link.wait_ended()
            self._say(f"Ray's client has ended, and is started again; workers go on (log: {self._link.log})")
            while not await self._is_connected_again():  # noqa: ASYNC110  # nobody tells of it unasked
                await asyncio.sleep(AGAIN_S)

    async def _is_connected_again(self) -> bool:
        try:
            await self._connect()
        except BackendError as error:
            self._say(f"the cluster of Ray cannot be reached: {error}; this is tried again")
            return False
        for worker in self._workers.values():
            self._link.tell(do="start", worker=worker.name)
        return True

    def start(self, spec: ProcessSpec, log: Path) -> Started:
        worker = RayWorker(spec.name, log, self._folder, self._config, self._link, self._forget)
        self._workers[spec.name] = worker
        self._link.tell(do="start", worker=spec.name)
        return worker

    def dismiss(self, name: str) -> None:
        self._link.tell(do="release", worker=name)

    def _forget(self, worker: RayWorker) -> None:
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]

    def _hear(self, news: Mapping[str, Any]) -> None:
        worker = self._workers.get(str(news.get("worker")))
        if worker is not None:
            worker.hear(news)
        elif news.get("error"):
            self._say(str(news["error"]))

    async def close(self) -> None:
        try:
            if self._keeping is not None:
                self._keeping.cancel()
                await asyncio.gather(self._keeping, return_exceptions=True)
                await self._link.ask(SWEEP_S, do="sweep")
                self._keeping = None
        except BackendError as error:
            if self.handle:  # else the cluster ends with us, and all workers with it
                raise BackendError(f"workers may be left in Ray: {error}") from error
        finally:
            await self._link.close()

    @classmethod
    def sweep(cls, handle: Mapping[str, str]) -> None:
        wanted = {**handle, "pools": [], "config": "", "environ": {}, "version": __version__}
        ask_once({"do": "open", "wanted": wanted}, {"do": "sweep"}, limit_s=SWEEP_S)


class RayWorker:
    """A worker is what its actor tells of it."""

    is_kept = True
    is_expiring = False
    pid: int | None = None

    def __init__(
        self,
        name: str,
        log: Path,
        folder: Path,
        config: Config,
        link: Link,
        forget: Callable[[RayWorker], None],
    ) -> None:
        self.name = name
        self.starts = 0
        self.ready_url = ""
        self.trouble: str | None = None
        self._log = log
        self._folder = folder
        self._config = config
        self._link = link
        self._tell_end = forget
        self._uid = ""
        self._code: int | None = None
        self._is_gone = False

    def hear(self, news: Mapping[str, Any]) -> None:
        """Take over what the agent tells."""
        if "report" in news:
            self._note(news["report"])
        if "trouble" in news:
            self.trouble = news["trouble"]
        if "error" in news:
            self.trouble = news["error"]

    def _note(self, report: Mapping[str, Any]) -> None:
        if report["output"]:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(report["output"])
        if report["uid"] != self._uid and report["uid"]:
            self._uid = report["uid"]
            self.starts += 1
        self._code = report["code"]
        self.trouble = None
        if report["ready_url"] not in ("", self.ready_url):
            self.ready_url = report["ready_url"]
            self._publish()

    def _publish(self) -> None:
        place = place_of(self._config, self.name)
        member = Member(
            uid=self._uid,
            name=self.name.rpartition("/")[2],
            model=place.model.name,
            role=place.role,
            url=self.ready_url.removesuffix("/health"),
            zone=place.pool.zone,
        )
        write_member(self._folder, member)

    def exit_code(self) -> int | None:
        return self._code

    def is_gone(self) -> bool:
        return self._is_gone

    def hang_up(self) -> None:
        """Do nothing: a worker reloads nothing."""

    def signal(self, number: signal.Signals) -> None:
        """End it at once, whatever the signal is: none but SIGKILL is sent."""
        self._link.tell(do="kill", worker=self.name)

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        """Have the engine and its actor end; what stays out of reach ends with its node, or by `sweep`."""
        if self._is_gone:
            return True
        asking = asyncio.create_task(
            self._link.ask(limit_s + STOP_MARGIN_S, do="stop", worker=self.name, limit_s=limit_s)
        )
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait((asking, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not asking.done():
            self.signal(signal.SIGKILL)
        has_obeyed = False
        with contextlib.suppress(BackendError):
            has_obeyed = bool(await asking)
        self._is_gone = True
        self._tell_end(self)
        with contextlib.suppress(OSError):
            remove_member(self._folder, self._uid)
        return has_obeyed

    def forget(self) -> None:
        """Do nothing: nothing is kept of a worker that is gone."""
