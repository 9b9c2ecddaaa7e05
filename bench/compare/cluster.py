"""A router is at work between two mock workers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.compare.routers import Router, Site
from bench.shared.baton import Process
from bench.shared.bodies import small_chat
from bench.shared.processes import Failed, free_port, python, running

JSON = {"content-type": "application/json"}
READY_LIMIT_S = 60.0


@dataclass(frozen=True)
class Workers:
    """Workers are known by their ports."""

    prefill: int
    decode: int


@dataclass(frozen=True)
class Target(Process):
    """A load goes to this router; `decode` is the port of the worker that answers through it."""

    decode: int


@contextmanager
def mock_workers(cores: Set[int], decode_options: tuple[str, ...] = ()) -> Iterator[Workers]:
    """Run both; of a stream the prefill worker sends its first token only, should a router ask for one."""
    with _mock_worker(cores, "--events", "1") as prefill, _mock_worker(cores, *decode_options) as decode:
        yield Workers(prefill, decode)


@contextmanager
def _mock_worker(cores: Set[int], *options: str) -> Iterator[int]:
    port = free_port()
    with running(python("-m", "bench.shared.mock_worker", "--port", str(port), *options), port, cores=cores):
        yield port


@contextmanager
def at_work(router: Router, workers: Workers, cores: Set[int]) -> Iterator[Target]:
    """Run a router, and yield it once it answers. Raises `Failed` if it ends, or does not answer in time."""
    with tempfile.TemporaryDirectory() as folder:
        site = Site(free_port(), workers.prefill, workers.decode, Path(folder))
        with running(router.command(site), site.port, cores=cores, env=router.env) as pid:
            target = Target(pid, site.port, workers.decode)
            wait_until_answered(target)
            yield target


def wait_until_answered(target: Process) -> None:
    """Return once a router has answered a small chat: it may listen before it has found its workers. Raises
    `Failed`.
    """
    end = time.monotonic() + READY_LIMIT_S
    while (answer := _ask(target)) is not None:
        if time.monotonic() > end:
            raise Failed(f"not ready after {READY_LIMIT_S:.0f} s: {answer}")
        time.sleep(0.1)


def _ask(target: Process) -> str | None:
    """Say what is wrong with the answer to a small chat, or return None."""
    url = f"{target.url}/v1/chat/completions"
    try:
        answer = httpx.post(url, content=small_chat(), headers=JSON, timeout=10)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None if answer.is_success else f"HTTP {answer.status_code} {' '.join(answer.text.split())[:160]}"
