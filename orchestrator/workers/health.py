"""Active probes find out which workers are there, what they can decode, and how long a prompt may be.

A probe only says what it saw; what follows from that is in `workers/states.py` and `workers/judge.py`.

| the worker | is asked |
|---|---|
| in service | `/baton/ready`, without the key; at times (`NAME_EVERY`) or after doubt as in the next row |
| not in service | `/baton/ready`, `/baton/info` and, with the key, `/v1/models` |
| one that denied a leg | the same, and each path of `ENDPOINTS` with an empty document, which is no request |

A worker without `/baton/ready` (`wire/load.py`), such as plain vLLM, is asked for `/health` instead. If the
legs of other orchestrators count, they are read from its `/metrics`, beside the probes and without any effect
on them: with each probe while there are some, and more seldom otherwise, for such a page costs the worker a
few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from itertools import islice
from random import Random
from typing import Protocol, cast

import httpx
import msgspec

from orchestrator.telemetry.events import Events
from orchestrator.transport.base import host_header
from orchestrator.transport.shortage import is_shortage
from orchestrator.wire.info import Count, WorkerInfo
from orchestrator.wire.load import READY_PATH, SENDER_HEADER, LoadReport, read_metrics, read_report
from orchestrator.wire.refusals import is_denial, is_encoded
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.lifecycle import verdict_at
from orchestrator.workers.registry import Registry
from orchestrator.workers.scarcity import Scarcity
from orchestrator.workers.states import FULL_SERVICE, IN_SERVICE, NEVER, Event, WorkerState
from orchestrator.workers.troubles import (
    DENIES,
    FAILS,
    FEWER_ENGINES,
    GARBAGE,
    OTHER_MODEL,
    REFUSES,
    SILENT,
    Trouble,
    answered,
    trouble_of,
)
from orchestrator.workers.worker import Worker

GREETING_S = 5.0  # limit of a probe of a worker that is not in service: nothing depends on it
JITTER = 0.2  # of the interval: probes of many workers, or by many orchestrators, do not come all at once
LAST_PROBE = 1.5  # of the timeout: with less time than this until the verdict, there is but one more probe
IMPATIENT = 0.1  # of the interval: what lies between probes of a suspect, or before that of one that refused
NAME_EVERY = 10  # probes of a worker in service: a key or settings that were changed show within so many
MAX_PAGE_BYTES = 1024 * 1024  # of an answer to a probe; a list of models has some hundred bytes for each
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")  # every worker has one of these

# A worker that is being started gives the same signs as one that is not there. It has so many seconds, and
# one that `baton up` starts, which watches it too, has more: loading a model takes minutes.
PATIENCE_S = 3.0
PATIENCE_MANAGED_S = 600.0
MAX_ADAPTERS, MAX_ADAPTER = 1000, 256  # of a worker that are known, and characters of each
METRICS_PATH, METRICS_S = "/metrics", 5.0  # until its page is given up
QUIET = 8  # polls in a row without legs of others, after which so many probes are without a poll
MAX_NAMES, MAX_NAME = 5, 60  # models of a worker that are shown, and characters of each
TELL_EVERY_S = 5.0  # a reason that changes to and fro is told no more often
COMPLAINT_S = 60.0  # between two lines about what keeps workers from being probed

_ABSENT = (404, 405)  # of a path that a worker does not have
_DENIED = (401, 403, 407)  # without the key that somebody wants

_log = logging.getLogger("baton.health")


class ProbeRefused(Exception):
    """The probe's connection was refused: nobody listens there."""


class ProbeFailed(Exception):
    """The worker is ill, is not the one that the config means, or cut the probe off; the message says why."""

    def __init__(self, why: str, trouble: Trouble = FAILS) -> None:
        super().__init__(why)
        self.trouble = trouble


class ProbeUnfit(ProbeFailed):
    """Somebody answers there who does not serve us, or not this model."""


class ProbeImpossible(Exception):
    """This machine could not open the probe's connection, for want of something of its own."""


class Probe(Protocol):
    """Asks a worker how it is."""

    async def __call__(self, worker: Worker) -> Introduction | None:
        """Return if the worker is well: its introduction if it was not in service, else None.

        Raises `ProbeRefused`, `ProbeFailed`, `ProbeUnfit` or `ProbeImpossible`. The caller cancels a probe
        that takes too long.
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
        events: Events | None = None,
        scarcity: Scarcity | None = None,
    ) -> None:
        """`time` is the registry's clock; `random` makes the jitter of pauses; `events` hear what becomes of
        workers. `scarcity` says when to ask more often for what other orchestrators have.
        """
        self._scarcity = scarcity
        self._registry = registry
        self._ask = probe
        self._random = random
        self._time = time
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._teller = _Teller(time, events or Events())
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
        registry.news.moved.add(self._teller.note_move)
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
        self._teller.forget(worker)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    async def _watch(self, worker: Worker) -> None:
        await asyncio.sleep(self._first_pause_s(worker))
        while True:
            try:
                await self._probe(worker)
            except Exception:  # a bug of ours: a worker that nobody probes any more would be lost for ever
                _log.exception("the probe of %s failed", worker.name)
            await asyncio.sleep(self._pause_s(worker))

    def _first_pause_s(self, worker: Worker) -> float:
        match worker.state:
            case WorkerState.GONE:  # one that was just refused is not back at once
                return self._registry.health.interval_s * IMPATIENT
            case WorkerState.EJECTED:
                return worker.suspicion.retry_at - self._time()
        return 0.0

    def _pause_s(self, worker: Worker) -> float:
        jitter = self._random.uniform(1 - JITTER, 1 + JITTER)
        interval_s = self._registry.health.interval_s * jitter
        match worker.state:
            case WorkerState.READY if self._scarcity is not None:
                return self._scarcity.pause_s(worker, self._registry.health.interval_s) * jitter
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
        judge, asked, was_denied = self._registry.judge, self._time(), worker.is_denied
        try:
            async with asyncio.timeout(self._limit_s(worker)):
                introduction = await self._ask(worker)
        except TimeoutError:
            with self._teller.telling(worker, SILENT):
                judge.note_missed(worker, asked)
        except ProbeRefused as error:
            with self._teller.telling(worker, REFUSES):
                judge.mark_gone(worker, str(error))
        except ProbeImpossible as error:
            self._complain(worker, str(error))
        except Exception as error:
            with self._teller.telling(
                worker, getattr(error, "trouble", None) or trouble_of(error)
            ) as trouble:
                note = judge.note_unfit if isinstance(error, ProbeUnfit) else judge.note_failed
                note(worker, _named(error), trouble.what)
        else:
            if was_denied:
                judge.note_cleared(worker)
            if introduction is not None:
                self._registry.announce(worker, introduction)
            self._let_in(worker, is_new=introduction is not None)

    def _let_in(self, worker: Worker, *, is_new: bool) -> None:
        """Note that a worker is well. One that has just introduced itself must fit the others, too."""
        judge = self._registry.judge
        misfit = judge.misfit(worker) if is_new else None
        if misfit is None:
            judge.mark_ready(worker)
            return
        with self._teller.telling(worker, Trouble(misfit.reason)):
            judge.note_unfit(worker, misfit.why, misfit.reason)

    def _complain(self, worker: Worker, why: str) -> None:
        """Say that workers cannot be probed, which is no worker's fault, from time to time."""
        if self._time() - self._complained >= COMPLAINT_S:
            self._complained = self._time()
            _log.warning("%s cannot be probed: %s", worker.name, why)


def _named(error: Exception) -> str:
    """Return what an exception says, with its name if it is not one of ours."""
    return str(error) if isinstance(error, ProbeFailed) else f"{type(error).__name__}: {error}"


class _Teller:
    """It tells the log and the events what becomes of workers, and the log why one cannot be used: once for
    each reason.
    """

    def __init__(self, time: Callable[[], float], events: Events) -> None:
        self._time = time
        self._events = events
        self._troubles: dict[Worker, Trouble] = {}  # that the probe whose result is being noted has seen
        self._told: dict[Worker, tuple[str | None, float]] = {}  # the reason, and when
        self._first: dict[Worker, float] = {}  # when the first probe of a worker that starts failed

    def forget(self, worker: Worker) -> None:
        self._told.pop(worker, None)
        self._first.pop(worker, None)

    @contextlib.contextmanager
    def telling(self, worker: Worker, trouble: Trouble) -> Iterator[Trouble]:
        """Note inside this what a probe has seen; then the log gets it, if the worker is out of service."""
        self._troubles[worker] = trouble
        try:
            yield trouble
        finally:
            del self._troubles[worker]
        if worker.state not in IN_SERVICE and self._is_news(worker, trouble):
            self._note_told(worker, trouble.what)
            _log.warning("%s cannot be used: it %s%s", worker.name, trouble.what, _details(worker, trouble))

    def note_move(self, worker: Worker, event: Event) -> None:
        """Log that a worker has come to another state."""
        is_out = worker.state not in IN_SERVICE
        if worker.state is WorkerState.GONE and worker.is_drained:  # who stops a worker drains it before
            level, text = logging.INFO, f"{worker.name} is gone ({event}): it was drained before"
        else:
            level = logging.WARNING if is_out else logging.INFO
            text = f"{worker.name} is {worker.state} ({event}){self._why(worker, is_out)}"
        _log.log(level, "%s", text)
        self._events.note(f"worker.{worker.state}", text, subject=worker.name)
        if is_out:
            self._note_told(worker, worker.reason)
        elif worker.state is WorkerState.READY:
            self.forget(worker)

    def _why(self, worker: Worker, is_out: bool) -> str:
        trouble = self._troubles.get(worker, FAILS)
        why = f": {worker.last_error}" if worker.last_error else ""
        advice = f"; {trouble.advice}" if is_out and trouble.advice else ""
        return why + advice

    def _is_news(self, worker: Worker, trouble: Trouble) -> bool:
        now = self._time()
        reason, when = self._told.get(worker, (None, NEVER))
        if reason == trouble.what or now < when + TELL_EVERY_S:
            return False
        if worker.state is not WorkerState.STARTING or not trouble.may_pass:
            return True
        patience_s = PATIENCE_MANAGED_S if worker.address.is_managed else PATIENCE_S
        return now >= self._first.setdefault(worker, now) + patience_s

    def _note_told(self, worker: Worker, reason: str | None) -> None:
        self._told[worker] = (reason, self._time())


def _details(worker: Worker, trouble: Trouble) -> str:
    advice = f"; {trouble.advice}" if trouble.advice else ""
    return f" ({worker.last_error}){advice}"


# --- over HTTP ----------------------------------------------------------------------------------


class _ModelCard(msgspec.Struct):
    id: str
    max_model_len: Count | None = None
    parent: str | None = None  # the model that an adapter is of


class _Served(msgspec.Struct):
    """A worker serves the model that it is asked for."""

    max_model_len: int | None
    adapters: tuple[str, ...]
    names: tuple[str, ...]  # all that it lists


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


class HttpProbe:
    """This is the `Probe` for vLLM's server and for ours. Whoever made it closes it."""

    def __init__(
        self,
        credential: str | None,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        sender: str = "",
        tell: Callable[[Worker, LoadReport | None], None] = lambda worker, report: None,
    ) -> None:
        """Workers get `credential` as bearer token, and `sender` as the name of this orchestrator. A test's
        `transport` stands in for the network. `tell` is called with what a worker reports of its load, before
        its probe ends; of one that reports nothing None.
        """
        self._tell = tell
        self.sender = sender
        self._named = {SENDER_HEADER.lower(): sender} if sender else {}
        self._authorization = {"authorization": f"Bearer {credential}"} if credential else {}
        self._client = httpx.AsyncClient(
            headers={"accept-encoding": "identity"},
            timeout=None,  # noqa: S113  # whoever asks has limits of its own
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            transport=transport,
        )
        self._counts: dict[str, int] = {}  # probes in service, by worker
        self._odd: set[str] = set()  # workers whose announcements cannot be read
        self._plain: dict[str, int] = {}  # workers that had no readiness to tell, with their epochs then
        self._polls: dict[str, asyncio.Task[None]] = {}  # for metrics
        self._quiet: dict[str, int] = {}  # how many were due since one has shown legs of others

    async def aclose(self) -> None:
        for poll in self._polls.values():
            poll.cancel()
        await self.wait_polls()
        await self._client.aclose()

    async def wait_polls(self) -> None:
        """Wait until the metrics that are being read are known."""
        await asyncio.gather(*self._polls.values(), return_exceptions=True)

    async def __call__(self, worker: Worker) -> Introduction | None:
        is_known = worker.state in FULL_SERVICE or worker.state is WorkerState.DRAINING
        try:
            await self._check_well(worker)
            if not is_known or worker.is_denied:
                return await self._introduction(worker)
            return await self._changed(worker) if self._is_name_due(worker) else None
        except ProbeFailed:
            raise
        except Exception as error:  # whatever a worker has answered, it is no reason not to ask it again
            why = f"{type(error).__name__}: {error}"
            if is_shortage(error):
                raise ProbeImpossible(why) from error
            if _is_refusal(error):
                raise ProbeRefused(why) from error
            raise ProbeFailed(why, trouble_of(error)) from error

    async def _check_well(self, worker: Worker) -> None:
        """Ask a worker of ours whether it is ready, and others for their health."""
        if self._may_report(worker):
            status, content = await self._ask(worker, READY_PATH)
            report = read_report(status, content)
            if report is not None:
                return self._note_report(worker, report)
            if status in _ABSENT:
                self._plain[worker.name] = worker.epoch
            elif _is_ours(worker):
                raise _failed(READY_PATH, status, is_unfit=status in _DENIED)
        await self._check_health(worker)
        if worker.reported.is_heard and worker.state in IN_SERVICE:
            self._poll_soon(worker)
        else:
            self._tell(worker, None)
        return None

    def _may_report(self, worker: Worker) -> bool:
        """Tell whether a worker may be one that reports: ours, or one of which this is not known yet."""
        if worker.state not in IN_SERVICE:
            return True
        return _is_ours(worker) and self._plain.get(worker.name) != worker.epoch

    def _note_report(self, worker: Worker, report: LoadReport) -> None:
        self._tell(worker, report)
        if report.others is None and worker.reported.is_heard:  # it does not know whose legs it has
            self._poll_soon(worker)

    def _poll_soon(self, worker: Worker) -> None:
        """Read a worker's metrics, unless that is under way: a page may take longer than a probe may."""
        name, quiet = worker.name, self._quiet.get(worker.name, 0)
        self._quiet[name] = quiet + 1
        if name not in self._polls and (quiet <= QUIET or not quiet % QUIET):
            self._polls[name] = poll = asyncio.create_task(self._poll(worker), name=f"poll {name}")
            poll.add_done_callback(lambda _: self._polls.pop(name, None))

    async def _poll(self, worker: Worker) -> None:
        """Find out by a worker's metrics what others have there: what is not ours. A leg of ours may begin or
        end meanwhile: the larger number counts, so that no leg of ours is taken for another's.
        """
        legs, report = worker.legs, None
        with contextlib.suppress(Exception):  # no figures: nobody but us has legs there, for all we know
            async with asyncio.timeout(METRICS_S):
                status, page = await self._ask(worker, METRICS_PATH)
            report = read_metrics(page, worker.address.rank) if status == httpx.codes.OK else None
        if report is not None:
            others = max(0, report.busy - max(legs, worker.legs))
            if others:
                self._quiet[worker.name] = 0
            report = _merged(report, worker.reported.last, others)
        if report is not None or worker.reported.last is None:
            self._tell(worker, report)

    async def _check_health(self, worker: Worker) -> None:
        status, _ = await self._ask(worker, "/health")
        if status != httpx.codes.OK:
            raise _failed("/health", status, is_unfit=status in _DENIED)

    def _is_name_due(self, worker: Worker) -> bool:
        """Tell whether a worker in service is to show that it takes the key, and is who it was.

        One that was in doubt is the next time: it may have been started again, with other settings.
        """
        if worker.state is not WorkerState.READY:
            self._counts[worker.name] = NAME_EVERY - 1
            return False
        count = self._counts[worker.name] = self._counts.get(worker.name, 0) + 1
        return count % NAME_EVERY == 0

    async def _changed(self, worker: Worker) -> Introduction | None:
        """Return the introduction of a worker in service if it says something else than before."""
        found = await self._introduction(worker)
        return None if found == worker.introduction else found

    async def _introduction(self, worker: Worker) -> Introduction:
        """Ask a worker what it can do, each time that it comes back: it may be another version."""
        info = await self._info(worker)
        card = await self._card(worker)
        _check_model(info, card)
        _check_rank(worker, info)
        if worker.is_denied:
            await self._check_serves(worker)
        return Introduction(info, card.max_model_len, card.adapters)

    async def _card(self, worker: Worker) -> _Served:
        """Ask with the key for what the worker says of its model. Raises `ProbeUnfit` if it has another."""
        status, content = await self._ask(worker, "/v1/models")
        if status != httpx.codes.OK:
            is_ill = 500 <= status < 600 and not is_denial(status, content)
            raise _failed("/v1/models", status, is_unfit=not is_ill)
        cards = msgspec.json.decode(content, type=_ModelList).data
        served = worker.address.served_model
        for card in cards:
            if card.id == served:
                listed = tuple(each.id for each in cards)
                return _Served(card.max_model_len, _adapters(cards, served), listed)
        names = _listed(card.id for card in cards)
        raise ProbeUnfit(f"it serves {names}, not {served!r}", OTHER_MODEL)

    async def _check_serves(self, worker: Worker) -> None:
        """Raise `ProbeUnfit` if the worker denies what is asked of it at all paths that it could serve."""
        first = 0
        for path in ENDPOINTS:
            status, content = await self._ask(worker, path, b"{}")
            if not is_denial(status, content):
                return
            first = first or status
        trouble = (
            answered(first)
            if first in (401, 403, 407)
            else Trouble(f"{DENIES.what} ({first})", DENIES.advice)
        )
        raise ProbeUnfit(f"it answers {first} to {ENDPOINTS[0]}", trouble)

    async def _info(self, worker: Worker) -> WorkerInfo | None:
        """Return the announcement of a worker of ours; one that cannot be read counts for none."""
        try:
            status, content = await self._ask(worker, "/baton/info")
            if status != httpx.codes.OK:
                return None
            info = msgspec.json.decode(content, type=WorkerInfo)
        except (_BadPage, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._note_odd(worker, error)
            return None
        self._odd.discard(worker.name)
        return info

    def _note_odd(self, worker: Worker, error: Exception) -> None:
        if worker.name not in self._odd:
            self._odd.add(worker.name)
            _log.warning(
                "%s is taken for a plain worker: its /baton/info cannot be read: %.200s", worker.name, error
            )

    async def _ask(self, worker: Worker, path: str, document: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body of a page, of `MAX_PAGE_BYTES` at most, as it came. Raises `_BadPage`."""
        authorization = self._authorization if worker.gets_credential else {}
        headers = {"host": host_header(worker.origin), **self._named, **authorization}
        if worker.address.rank is not None:
            headers["x-data-parallel-rank"] = str(worker.address.rank)
        if document is not None:
            headers["content-type"] = "application/json"
        method, url = "GET" if document is None else "POST", worker.address.url + path
        async with self._client.stream(method, url, headers=headers, content=document) as response:
            status, content = response.status_code, await _bounded(response.stream)
        if is_encoded(response.headers.get("content-encoding", "").encode()):
            if status == httpx.codes.OK and content:
                raise _BadPage(f"{path} is encoded, which it was asked not to be")
            return status, b""
        return status, content


def _is_ours(worker: Worker) -> bool:
    """Tell whether a worker has announced itself when it came into service."""
    return worker.state in IN_SERVICE and worker.introduction.info is not None


def _merged(polled: LoadReport, told: LoadReport | None, others: int) -> LoadReport:
    """Return a report with what the metrics say of others; what the worker has told by itself stays."""
    return msgspec.structs.replace(polled if told is None or told.others is not None else told, others=others)


class _BadPage(ProbeFailed):
    """An answer to a probe is too large, or not what was asked for."""

    def __init__(self, why: str) -> None:
        super().__init__(why, GARBAGE)


async def _bounded(stream: object) -> bytes:
    """Read a body without undoing any encoding: what was small on the wire stays small."""
    content = bytearray()
    async for piece in cast(AsyncIterable[bytes], stream):
        content += piece
        if len(content) > MAX_PAGE_BYTES:
            raise _BadPage(f"an answer to a probe has more than {MAX_PAGE_BYTES} bytes")
    return bytes(content)


def _check_model(info: WorkerInfo | None, card: _Served) -> None:
    """Raise `ProbeUnfit` if the worker announces a model that it does not list: two servers answer there."""
    if info is not None and info.model not in card.names:
        raise ProbeUnfit(
            f"it announces {info.model!r:.{MAX_NAME}}, and lists {_listed(card.names)}", OTHER_MODEL
        )


def _check_rank(worker: Worker, info: WorkerInfo | None) -> None:
    """Raise `ProbeUnfit` if the worker says that it has no such data-parallel engine."""
    engines, rank = info.data_parallel_size if info is not None else None, worker.address.rank
    if engines is not None and rank is not None and rank >= engines:
        raise ProbeUnfit(f"it has {engines} data-parallel engines, and none of rank {rank}", FEWER_ENGINES)


def _adapters(cards: Iterable[_ModelCard], served: str) -> tuple[str, ...]:
    """Return the names of the adapters among the cards: those that have a parent."""
    names = (card.id for card in cards if card.parent is not None and card.id != served)
    return tuple(islice((name for name in names if 0 < len(name) <= MAX_ADAPTER), MAX_ADAPTERS))


def _failed(path: str, status: int, *, is_unfit: bool) -> ProbeFailed:
    kind = ProbeUnfit if is_unfit else ProbeFailed
    return kind(f"it answers {status} to {path}", answered(status))


def _listed(names: Iterable[str]) -> str:
    """Show some names that a worker has given itself."""
    first = [name[:MAX_NAME] for name in islice(names, MAX_NAMES)]
    return repr(first)


def _is_refusal(error: BaseException) -> bool:
    """Return whether the peer's machine answered that nobody listens."""
    return trouble_of(error) is REFUSES
