"""The pages of the control plane may see this of what runs, and show this of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from orchestrator.config.keys import KeyRing
from orchestrator.config.options import Config
from orchestrator.control.worker_watch import WorkerWatch
from orchestrator.http.ids import IdSource
from orchestrator.http.tls import Certificate
from orchestrator.loop.lag import LoopLagMonitor
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.tenants import KeyCounts
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.info import Streams
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerStatus

# --- processes ----------------------------------------------------------------------------------


class ProcessState(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    RETIRING = "retiring"  # another one is to serve in its place
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A status shows one data-plane process at one moment."""

    index: int  # one that retires and the one that follows it share it
    pid: int
    state: ProcessState
    in_flight: int  # requests


class ProcessEnd(StrEnum):
    """This is why a process that had served ended while nobody stopped the orchestrator."""

    RECYCLED = "recycled"
    DIED = "died"


# --- explanations -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteQuestion:
    """An operator asks what would become of a request."""

    path: str  # of the data plane
    headers: list[tuple[bytes, bytes]]  # names in lower case
    body: bytes
    avoid: tuple[str, ...] = ()  # names of workers
    process: int | None = None  # the index of the one that is to tell; None: any


@dataclass(frozen=True, slots=True)
class RouteAnswer:
    """A process answers with what it would do, or with the error that the client would get."""

    status: int
    content: bytes  # JSON


# --- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundRequests:
    """These requests match a query; some may be missing, if a process has not answered."""

    requests: list[dict[str, Any]]  # as `telemetry/timeline.py` has them
    unanswered: list[int]  # the indexes of processes


# --- what pages may see -------------------------------------------------------------------------


class Guarding(Protocol):
    """Every listener needs this to answer at all."""

    @property
    def ids(self) -> IdSource: ...

    @property
    def keys(self) -> KeyRing | None:
        """Return the API keys; None if everybody may ask."""
        ...


class State(Guarding, Protocol):
    """The public pages may see this of the process that answers; `app.py` provides it."""

    @property
    def config(self) -> Config: ...

    @property
    def index(self) -> int:
        """Return the index of this process among those that serve; 0 if it is the only one."""
        ...

    @property
    def telemetry(self) -> Telemetry: ...

    @property
    def lag(self) -> LoopLagMonitor: ...

    @property
    def transport(self) -> str:
        """Return the transport: json, orjson or msgpack."""
        ...

    @property
    def started(self) -> float:
        """Return the moment at which the orchestrator started, by `time.time()`."""
        ...

    @property
    def is_draining(self) -> bool:
        """Say whether the process is about to end."""
        ...

    def workers(self) -> Sequence[WorkerStatus]: ...

    def model_problems(self) -> Mapping[str, str | None]:
        """Return for every model None if a whole path exists, else why not."""
        ...


class AdminState(Guarding, Protocol):
    """The admin pages may see this of all processes together; `app.py` or the supervisor provides it."""

    @property
    def config(self) -> Config: ...

    @property
    def transport(self) -> str: ...

    @property
    def streams(self) -> Streams:
        """Return what BATON_STREAMS says here."""
        ...

    @property
    def certificate(self) -> Certificate | None:
        """Return the certificate that listeners serve with; None without TLS."""
        ...

    @property
    def layout(self) -> Layout: ...

    @property
    def registry(self) -> Registry:
        """Return the registry that decides who serves."""
        ...

    @property
    def events(self) -> Events: ...

    @property
    def watch(self) -> WorkerWatch: ...

    def counts(self) -> Sequence[int]:
        """Return one row of `Telemetry`, or the sum of several."""
        ...

    def keys_counted(self) -> Sequence[KeyCounts]:
        """Return what was counted of each API key; nothing if there are none."""
        ...

    def workers(self) -> Sequence[WorkerStatus]: ...

    def upstream(self) -> UpstreamStats: ...

    def processes(self) -> Sequence[ProcessStatus]: ...

    def process_ends(self) -> Mapping[ProcessEnd, int]: ...

    async def requests(self, query: RequestQuery) -> FoundRequests:
        """Return the requests that match, the newest first, of all processes."""
        ...

    async def explain(self, question: RouteQuestion) -> RouteAnswer:
        """Tell what would become of a request. Raises `Unavailable` if no process can tell."""
        ...
