"""Two mock workers, and a router at work between them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.compare.routers import Router, Site
from bench.shared.bodies import small_chat
from bench.shared.processes import Failed, free_port, python, running

JSON = {"content-type": "application/json"}
READY_LIMIT_S = 60.0


@dataclass(frozen=True)
class Cores:
    """Where the routers run, each at its time, and where the workers and the load do."""

    router: Set[int]
    other: Set[int]


@dataclass(frozen=True)
class Workers:
    """Ports."""

    prefill: int
    decode: int


@dataclass(frozen=True)
class Target:
    """A router at work, and the decode worker that answers through it."""

    pid: int
    port: int
    decode: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def share_cores() -> Cores:
    """The workers and this process, which makes some load, share a core; the routers get another one."""
    mine = sorted(os.sched_getaffinity(0))
    cores = Cores(router={mine[0]}, other={mine[-1]})
    os.sched_setaffinity(0, cores.other)
    return cores


@contextmanager
def mock_workers(cores: Set[int], decode_options: tuple[str, ...] = ()) -> Iterator[Workers]:
    """Of a stream a prefill worker answers its first token only, should a router ask it for one."""
    workers = Workers(free_port(), free_port())
    with (
        _mock_worker(workers.prefill, ("--events", "1"), cores),
        _mock_worker(workers.decode, decode_options, cores),
    ):
        yield workers


def _mock_worker(port: int, options: tuple[str, ...], cores: Set[int]) -> AbstractContextManager[int]:
    return running(python("-m", "bench.shared.mock_worker", "--port", str(port), *options), port, cores=cores)


@contextmanager
def at_work(router: Router, workers: Workers, cores: Set[int]) -> Iterator[Target]:
    """A router that answers. Raises `Failed` if it ends, or does not in time."""
    with tempfile.TemporaryDirectory() as folder:
        site = Site(free_port(), workers.prefill, workers.decode, Path(folder))
        with running(router.command(site), site.port, cores=cores, env=router.env) as pid:
            target = Target(pid, site.port, workers.decode)
            _wait_until_ready(target)
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
