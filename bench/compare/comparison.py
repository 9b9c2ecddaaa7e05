"""Every router gets each workload, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import httpx

from bench.compare.cluster import Target, Workers, at_work, mock_workers
from bench.compare.routers import Router
from bench.compare.workloads import Workload
from bench.shared.cores import Cores
from bench.shared.figures import Sample
from bench.shared.processes import Failed


@dataclass
class Row:
    """A router has a sample per round of a workload, or the reason why it has no figure."""

    router: str
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None


Start = Callable[[Router], AbstractContextManager[Target]]
Say = Callable[[str], None]


def compare(
    workload: Workload, routers: list[Router], *, cores: Cores, rounds: int, seconds: int, say: Say
) -> list[Row]:
    """Return a row per router. Rounds are interleaved, so that what disturbs one of them disturbs all.

    A router that fails once is not tried again and has no figure.
    """
    rows = {router.name: Row(router.name, reason=_lacks(workload, router)) for router in routers}
    with ExitStack() as stack:
        workers = stack.enter_context(mock_workers(cores.other, workload.worker))
        own = cores.router | cores.other if workload.is_wide else cores.router
        start: Start = partial(_warm, workload, workers, own)
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


def _kept(stack: ExitStack, start: Start) -> Start:
    """Start each router once, when it is first asked for, and leave it running until the stack ends."""
    at_work: dict[str, Target] = {}

    def keep(router: Router) -> AbstractContextManager[Target]:
        if router.name not in at_work:
            at_work[router.name] = stack.enter_context(start(router))
        return nullcontext(at_work[router.name])

    return keep


@contextmanager
def _warm(workload: Workload, workers: Workers, cores: Set[int], router: Router) -> Iterator[Target]:
    with at_work(router, workers, cores) as target:
        workload.measure.prepare(target)
        yield target
