"""Active probes find out which workers are there, what they can decode, and how long a prompt may be.

A probe only says what it saw; what follows from that is in `workers/states.py` and `workers/registry.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Protocol

import httpx
import msgspec

from orchestrator.transport.shortage import is_shortage
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.lifecycle import verdict_at
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import FULL_SERVICE, Event, WorkerState
from orchestrator.workers.worker import Worker

GREETING_S = 5.0  # limit of a probe of a worker that is not in service: nothing depends on it
JITTER = 0.2  # of the interval: probes of many workers, or by many orchestrators, do not come all at once
LAST_PROBE = 1.5  # of the timeout: with less time than this until the verdict, there is but one more probe
IMPATIENT = 0.1  # of the interval: what lies between probes of a suspect, or before that of one that refused
COMPLAINT_S = 60.0  # between two lines about what keeps workers from being probed

_log = logging.getLogger("baton.health")


class ProbeRefused(Exception):
    """The probe's connection was refused: nobody listens there."""


class ProbeFailed(Exception):
    """The worker is ill, is not the one that the config means, or cut the probe off; the message says why."""


class ProbeImpossible(Exception):
    """This machine could not open the probe's connection, for want of something of its own."""


class Introduction(msgspec.Struct, frozen=True):
    """A worker that comes into service, or back into it, says this of itself."""

    info: WorkerInfo | None  # None without our plugin
    max_model_len: int | None


class Probe(Protocol):
    """Asks a worker how it is."""

    async def __call__(self, worker: Worker) -> Introduction | None:
        """Return if the worker is well: its introduction if it was not in service, else None.

        Raises `ProbeRefused`, `ProbeFailed` or `ProbeImpossible`. The caller cancels a probe that takes too
        long.
        """
        ...


class Prober:
    """A prober probes every worker of a registry, also those that are added, until it is closed.

    Each worker has a task of its own.
    """

    def __init__(
        self,
        registry: Registry,
        probe: Probe,
        *,
        random: Random,
        time: Callable[[], float] = time.monotonic,
    ) -> None:
        """`time` is the registry's clock; `random` makes the jitter of pauses."""
        self._registry = registry
        self._ask = probe
        self._random = random
        self._time = time
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._settling: asyncio.Task[None] | None = None
        self._is_closed = False
        self._complained = -COMPLAINT_S

    def start(self) -> None:
        """Begin to probe. Call this inside the event loop that changes the registry."""
        registry = self._registry
        registry.news.added.add(self._watch_anew)
        registry.news.doubted.add(self._watch_anew)
        registry.news.gone.add(self._watch_anew)
        registry.news.removed.add(self._forget)
        registry.news.moved.add(_log_move)
        self._settling = asyncio.create_task(registry.settle_forever(), name="settle workers")
        for worker in registry.workers:
            self._watch_anew(worker)

    async def aclose(self) -> None:
        self._is_closed = True  # the registry goes on telling, for instance of legs that are cut at the end
        tasks = [*self._tasks.values()]
        if self._settling is not None:
            tasks.append(self._settling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch_anew(self, worker: Worker) -> None:
        """Probe a worker anew of which something was heard: a probe under way was sent before that."""
        task = self._tasks.get(worker)
        if self._is_closed or task is asyncio.current_task():
            return  # in the second case its own probe saw it
        if task is not None:
            task.cancel()
        self._tasks[worker] = asyncio.create_task(self._watch(worker), name=f"probe {worker.name}")

    def _forget(self, worker: Worker) -> None:
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    async def _watch(self, worker: Worker) -> None:
        await asyncio.sleep(self._first_pause_s(worker))
        while True:
            await self._probe(worker)
            await asyncio.sleep(self._pause_s(worker))

    def _first_pause_s(self, worker: Worker) -> float:
        match worker.state:
            case WorkerState.GONE:  # one that was just refused is not back at once
                return self._registry.health.interval_s * IMPATIENT
            case WorkerState.EJECTED:
                return worker.suspicion.retry_at - self._time()
        return 0.0

    def _pause_s(self, worker: Worker) -> float:
        interval_s = self._registry.health.interval_s * self._random.uniform(1 - JITTER, 1 + JITTER)
        match worker.state:
            case WorkerState.SUSPECT:
                return interval_s * IMPATIENT
            case WorkerState.EJECTED:
                return worker.suspicion.retry_at - self._time()
        return interval_s

    def _limit_s(self, worker: Worker) -> float:
        """Return the timeout of one probe: a suspect's last one ends with its time to give a sign of life."""
        timeout_s = self._registry.health.timeout_s
        if worker.state not in FULL_SERVICE:
            return max(GREETING_S, timeout_s)
        left_s = verdict_at(worker, self._registry.health) - self._time()
        is_last = worker.state is WorkerState.SUSPECT and 0 < left_s < LAST_PROBE * timeout_s
        return left_s if is_last else timeout_s

    async def _probe(self, worker: Worker) -> None:
        registry, asked = self._registry, self._time()
        try:
            async with asyncio.timeout(self._limit_s(worker)):
                introduction = await self._ask(worker)
        except TimeoutError:
            registry.note_missed(worker, asked)
        except ProbeRefused as error:
            registry.mark_gone(worker, str(error))
        except ProbeFailed as error:
            registry.note_failed(worker, str(error))
        except ProbeImpossible as error:
            self._complain(worker, str(error))
        else:
            if introduction is not None:
                registry.announce(worker, introduction.info, introduction.max_model_len)
            registry.mark_ready(worker)

    def _complain(self, worker: Worker, why: str) -> None:
        """Say that workers cannot be probed, which is no worker's fault, from time to time."""
        if self._time() - self._complained >= COMPLAINT_S:
            self._complained = self._time()
            _log.warning("%s cannot be probed: %s", worker.name, why)


def _log_move(worker: Worker, event: Event) -> None:
    is_out = worker.state in (WorkerState.GONE, WorkerState.EJECTED)
    why = f": {worker.last_error}" if worker.last_error else ""
    _log.log(
        logging.WARNING if is_out else logging.INFO, "%s is %s (%s)%s", worker.name, worker.state, event, why
    )


# --- over HTTP ----------------------------------------------------------------------------------


class _ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


class HttpProbe:
    """This is the `Probe` for vLLM's server and for ours. Whoever made it closes it."""

    def __init__(self, credential: str | None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Workers get `credential` as bearer token. A test's `transport` stands in for the network."""
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {credential}"} if credential else {},
            timeout=None,  # noqa: S113  # whoever asks has limits of its own
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            transport=transport,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def __call__(self, worker: Worker) -> Introduction | None:
        is_known = worker.state in FULL_SERVICE or worker.state is WorkerState.DRAINING
        try:
            (await self._get(worker, "/health")).raise_for_status()
            return None if is_known else await self._introduction(worker)
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            why = f"{type(error).__name__}: {error}"
            if is_shortage(error):
                raise ProbeImpossible(why) from error
            raise (ProbeRefused if _is_refusal(error) else ProbeFailed)(why) from error

    async def _introduction(self, worker: Worker) -> Introduction:
        """Ask a worker what it can do, each time that it comes back: it may be another version."""
        info = await self._info(worker)
        answer = await self._get(worker, "/v1/models")
        answer.raise_for_status()
        cards = msgspec.json.decode(answer.content, type=_ModelList).data
        served = worker.address.served_model
        for card in cards:
            if card.id == served:
                return Introduction(info, card.max_model_len)
        raise ProbeFailed(f"it serves {[card.id for card in cards]}, not {served!r}")

    async def _info(self, worker: Worker) -> WorkerInfo | None:
        answer = await self._get(worker, "/baton/info")
        if answer.status_code == httpx.codes.OK:
            return msgspec.json.decode(answer.content, type=WorkerInfo)
        return None

    async def _get(self, worker: Worker, path: str) -> httpx.Response:
        return await self._client.get(worker.address.url + path)


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether the peer's machine answered that nobody listens; httpx keeps that some causes deep."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
