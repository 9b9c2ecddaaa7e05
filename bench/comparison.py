"""Every router on a workload, in interleaved rounds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from bodies import small_chat
from measures import JSON, Sample, Target
from processes import Failed, free_port, python, running
from routers import Router, Site
from workloads import Workload

READY_LIMIT_S = 60.0


@dataclass
class Row:
    """A router on a workload: a sample per round, or the reason why there is no figure."""

    router: str
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class Cores:
    """Where the routers run, each at its time, and where the workers and the load do."""

    router: int
    other: int


@dataclass(frozen=True)
class Workers:
    prefill: int
    decode: int


Start = Callable[[Router], AbstractContextManager[Target]]
Say = Callable[[str], None]


def compare(
    workload: Workload, routers: list[Router], *, cores: Cores, rounds: int, seconds: int, say: Say
) -> list[Row]:
    """A row per router. Rounds are interleaved, so that what disturbs the machine disturbs all of them.

    A router that fails once is not tried again and has no figure.
    """
    rows = {router.name: Row(router.name, reason=_lacks(workload, router)) for router in routers}
    with ExitStack() as stack:
        workers = stack.enter_context(_mock_workers(workload, cores.other))
        start: Start = partial(_at_work, workload, workers, cores.router)
        if not workload.is_fresh:
            start = _kept(stack, start)
        for number in range(1, rounds + 1):
            say(f"{workload.name}: round {number} of {rounds}")
            for router in routers:
                if rows[router.name].reason is None:
                    _add_sample(rows[router.name], workload, start, router, seconds)
    return list(rows.values())


def _lacks(workload: Workload, router: Router) -> str | None:
    return workload.measure.lacks() or router.lacks()


def _add_sample(row: Row, workload: Workload, start: Start, router: Router, seconds: int) -> None:
    try:
        with start(router) as target:
            row.samples.append(workload.measure.sample(target, seconds))
    except (Failed, OSError, httpx.HTTPError) as error:
        row.reason = str(error) or type(error).__name__


@contextmanager
def _mock_workers(workload: Workload, core: int) -> Iterator[Workers]:
    """Of a stream a prefill worker answers its first token only, should a router ask it for one."""
    workers = Workers(free_port(), free_port())
    with (
        _mock_worker(workers.prefill, ("--events", "1"), core),
        _mock_worker(workers.decode, workload.worker, core),
    ):
        yield workers


def _mock_worker(port: int, options: tuple[str, ...], core: int) -> AbstractContextManager[int]:
    return running(python("bench/mock_worker.py", "--port", str(port), *options), port, core=core)


def _kept(stack: ExitStack, start: Start) -> Start:
    """Start each router once, when it is first asked for, and leave it running until the stack ends."""
    at_work: dict[str, Target] = {}

    def keep(router: Router) -> AbstractContextManager[Target]:
        if router.name not in at_work:
            at_work[router.name] = stack.enter_context(start(router))
        return nullcontext(at_work[router.name])

    return keep


@contextmanager
def _at_work(workload: Workload, workers: Workers, core: int, router: Router) -> Iterator[Target]:
    """A router that is started, serves, and is warm."""
    with tempfile.TemporaryDirectory() as folder:
        site = Site(free_port(), workers.prefill, workers.decode, Path(folder))
        with running(router.command(site), site.port, core=core, env=router.env) as pid:
            target = Target(pid, site.port, workers.decode)
            _wait_until_ready(target)
            workload.measure.prepare(target)
            yield target


def _wait_until_ready(target: Target) -> None:
    """Routers listen before they have found their workers."""
    end = time.monotonic() + READY_LIMIT_S
    while (answer := _ask(target)) is not None:
        if time.monotonic() > end:
            raise Failed(f"not ready after {READY_LIMIT_S:.0f} s: {answer}")
        time.sleep(0.1)


def _ask(target: Target) -> str | None:
    """What is wrong with the answer to a small chat, or None."""
    url = f"{target.url}/v1/chat/completions"
    try:
        answer = httpx.post(url, content=small_chat(), headers=JSON, timeout=10)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None if answer.is_success else f"HTTP {answer.status_code} {' '.join(answer.text.split())[:160]}"
