"""A backend is where the workers of a run are: on this machine, or wherever a cluster has found them a place.

A new backend is one file beside this one, one entry in `BACKENDS` and its name in the config's option
`launch.backend`. The orchestrator knows no backend: it finds the workers of all but the local one by the
files of members that the backend keeps (`orchestrator/wire/member.py`).
"""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self

from launch.local.processes import Guard
from launch.plan import ProcessSpec
from orchestrator.config.options import Config


class BackendError(Exception):
    """A backend cannot do what is asked of it; the message says what is missing, and what to do."""


class Started(Protocol):
    """A process is one worker of the run, or the orchestrator, which a backend has started.

    Whoever has it started must `end()` it. What is told of it is what was seen last: only `end` waits.
    """

    @property
    def is_kept(self) -> bool:
        """Return whether its backend starts it again as often as it ends, perhaps elsewhere."""
        ...

    @property
    def starts(self) -> int:
        """Return how often it was started; more than once only if it is kept."""
        ...

    @property
    def ready_url(self) -> str:
        """Return what answers 200 once it is up; an empty text while nobody knows where it is."""
        ...

    @property
    def trouble(self) -> str | None:
        """Return what keeps it from running now, for the user: no free place, a node that is lost."""
        ...

    @property
    def pid(self) -> int | None:
        """Return the number of the process on this machine; None if it runs on another one, or not at all."""
        ...

    @property
    def is_expiring(self) -> bool:
        """Return whether its place is lost soon, so that it should start anew in another one."""
        ...

    def exit_code(self) -> int | None:
        """Return the exit code of the latest start, negative for a signal; None while it has not ended.

        It is `UNKNOWN_CODE` if it has ended, and nobody knows with what.
        """
        ...

    def is_gone(self) -> bool:
        """Return whether nothing of it is left, so that it can be started again where it was."""
        ...

    def hang_up(self) -> None:
        """Send SIGHUP to the process; nothing happens if it has ended, or is none that reloads anything."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and all that it has started; nothing happens if there is nothing left."""
        ...

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        """Have it end, by force after `limit_s` or as soon as `hurry` is set; this can be repeated.

        It is not started again. Returns whether it went without force.
        """
        ...

    def forget(self) -> None:
        """Let go of what is kept of a process that is gone."""
        ...


class Backend(ABC):
    """A backend starts the workers of one run. Whoever makes it must `close()` it."""

    is_here: ClassVar[bool] = False  # on this machine: ports and GPUs are chosen, and checked, before a start

    @classmethod
    @abstractmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        """Return the backend of a run that has this directory. Nothing is reached yet.

        `say` tells the user of what stays to be read; the guard ends processes with `baton up`.
        """

    @property
    def members(self) -> Path | None:
        """Return the folder of members that the orchestrator looks at; None if the config has them all."""
        return None

    @property
    def handle(self) -> Mapping[str, str]:
        """Return what `sweep` needs to find what a killed `baton up` leaves; nothing if it leaves none.

        It is written down before `open`, and again before any worker is started.
        """
        return {}

    @abstractmethod
    async def open(self, specs: Sequence[ProcessSpec]) -> None:
        """Reach the cluster, and have it find places for these workers, which are started next.

        Nothing is waited for that may take minutes, such as free GPUs: `Started.trouble` tells of those.
        Raises `BackendError`; `close` then gives back what there is.
        """

    @abstractmethod
    def start(self, spec: ProcessSpec, log: Path) -> Started:
        """Start a worker, without waiting for it; what it writes is appended to the file `log`.

        One that was not among those of `open`, or has ended since, is given a place of its own. Raises
        `OSError` and `BackendError`.
        """

    def dismiss(self, name: str) -> None:  # noqa: B027  # a backend may have nothing to give up
        """Give up the place of a worker that was ended, and is not to be started again."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of all places. Every worker has been ended before; this can be repeated.

        A cluster that was given nothing is not asked. Raises `BackendError` if something may be left.
        """

    @classmethod
    @abstractmethod
    def sweep(cls, handle: Mapping[str, str]) -> None:
        """End all that a killed run has left, by its `handle`, before this returns. Raises `BackendError`."""
